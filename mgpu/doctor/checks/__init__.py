"""Every check there is, in files by subject."""
