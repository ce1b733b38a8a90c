"""Training loops to copy. Each file is one loop; run it with ``optx run NAME``.

A recipe NAME has ``main`` and ``options()``, which makes its command line. What ``--arms`` is by default (or
``ARMS``, where there is no such option) are the keys of ``results["arms"]``, with ``/seed`` behind.
``_NAME_report`` has ``tables(results)``, which the terminal and the results page both show. A benchmark
``_bench_NAME`` has ``main``, ``options`` and ``tables``.
"""
