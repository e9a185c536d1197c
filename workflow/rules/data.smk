rule data:
    input:
        # first, but a new diagnosis does not make new data
        doctor=ancient("results/doctor.json"),
    output:
        "results/data/train.parquet",
        "results/data/validation.parquet",
        "results/data/test.parquet",
    params:
        settings=settings_of("data"),
        code=code_of("data"),
    log:
        "results/logs/data.log",
    benchmark:
        "results/benchmarks/data.tsv"
    resources:
        mem_mb=4000,
        runtime=30,
    shell:
        "{KVPIPE} data {COMMON} > {log} 2>&1"
