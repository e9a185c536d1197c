rule data:
    output:
        **makes("data"),
    log:
        PATHS.log("data"),
    benchmark:
        PATHS.benchmark("data")
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        settings=settings("data"),
        code=code("data"),
    shell:
        "python -m kvpipe data > {log} 2>&1"
