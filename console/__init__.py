"""What the commands share: parser, progress line, summary, files that a stopped run continues."""
