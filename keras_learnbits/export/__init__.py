"""What leaves the library: `packed`, a file as small as `bit_table` says."""
