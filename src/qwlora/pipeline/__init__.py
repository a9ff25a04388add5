"""The stages in order, over one output directory. Each reads artifacts, writes the next, and is skipped when nothing that it depends on has changed."""
