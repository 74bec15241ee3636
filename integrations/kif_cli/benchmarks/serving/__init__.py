"""`kif bench --serve`: a real vLLM server with KIF beside a stock one, both under the same requests, as ratios."""
