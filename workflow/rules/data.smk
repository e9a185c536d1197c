rule data:
    output:
        [PATHS.data(split) for split in SPLITS],
    log:
        PATHS.log("data"),
    benchmark:
        PATHS.benchmark("data")
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        settings=settings_of("data"),
        code=code_of("data.build"),
    shell:
        "python -m kvpipe data > {log} 2>&1"
