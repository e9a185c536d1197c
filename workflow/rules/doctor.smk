rule doctor:
    output:
        "results/doctor.json",
    log:
        "results/logs/doctor.log",
    benchmark:
        "results/benchmarks/doctor.tsv"
    resources:
        mem_mb=1000,
        runtime=5,
    params:
        settings=settings_of("doctor"),
        code=code_of("doctor"),
    shell:
        "python -m kvpipe doctor --out {output} > {log} 2>&1"
