"""What runs in the API server: admission of requests, admin routes, metrics."""
