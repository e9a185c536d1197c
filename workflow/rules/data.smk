rule data:
    output:
        "results/data/train.parquet",
        "results/data/validation.parquet",
        "results/data/test.parquet",
    log:
        "results/logs/data.log",
    benchmark:
        "results/benchmarks/data.tsv"
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        settings=settings_of("data"),
        code=code_of("data.build"),
    shell:
        "python -m kvpipe data > {log} 2>&1"
