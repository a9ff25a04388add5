"""One run: the models that stages share, the stages in order, and what a run says."""
