"""report.html: one self-contained page for each job."""
