"""Changes of drivers: the only part of the project that makes any."""
