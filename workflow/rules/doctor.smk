rule doctor:
    output:
        "results/doctor.json",
    params:
        settings=settings_of("doctor"),
        code=code_of("doctor"),
    log:
        "results/logs/doctor.log",
    benchmark:
        "results/benchmarks/doctor.tsv"
    resources:
        mem_mb=1000,
        runtime=5,
    shell:
        "{KVPIPE} doctor {COMMON} --out {output} > {log} 2>&1"
