"""report.html: one self-contained page for each job, and a page that compares jobs."""
