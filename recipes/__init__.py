"""Training loops to copy. Each file is one loop; run it with ``optx run NAME``.

A recipe NAME has ``main``, ``options()``, which makes its command line, and ``ARMS``: with ``/seed`` behind,
they are the keys of ``results["arms"]``. ``_NAME_report`` has ``tables(results)``, which the terminal and the
results page both show. A benchmark ``_bench_NAME`` has ``main``, ``options`` and ``tables``.
"""
