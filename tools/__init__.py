"""Programs for those who maintain the bundles: make and check them, synthetic CT, training data."""
