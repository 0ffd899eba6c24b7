"""Published weight files: the catalog, finding and downloading them, reading and writing every layout."""
