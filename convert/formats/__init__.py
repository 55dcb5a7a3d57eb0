"""One module a format: `matches(path)` by content, `read(path, ...)` and `write(bundle, path)`."""
