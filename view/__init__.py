"""The page: an analysis as a folder of files that any browser opens, without a server."""
