"""What `kif bench` measures. Nothing here prints: every figure is a row that says where it was taken."""
