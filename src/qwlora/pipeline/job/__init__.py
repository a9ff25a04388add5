"""The directory of one job: its records, its texts, and how it is changed safely."""
