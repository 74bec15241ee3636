"""What runs in the workers, next to the model. The engine core calls `install` and `apply` there by name."""
