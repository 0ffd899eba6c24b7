"""Published weights: the catalog, finding and downloading files, reading and writing every layout."""
