"""What commands do with an existing job."""
