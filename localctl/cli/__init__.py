"""The programs: flags and settings, then one call of the library. Each has a `main(argv)`."""
