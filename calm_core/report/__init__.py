"""Pages to look at: self-contained HTML files of runs and of scaling studies."""
