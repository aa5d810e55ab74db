"""Device code. Importing a kernel module imports triton; nothing above `backends` does."""
