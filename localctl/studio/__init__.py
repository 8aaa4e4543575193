"""The studio: a web page on which regions, masks and conditions are painted, and images generated from them."""
