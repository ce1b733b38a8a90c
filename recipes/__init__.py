"""Training loops to copy. Each file is one loop; run it with ``optx run NAME``."""
