rule evaluate:
    input:
        "results/train/{arm}/seed{seed}/model",
        split_file("test"),
    output:
        "results/evaluate/{arm}/seed{seed}.parquet",
    params:
        settings=settings_of("evaluate"),
        code=code_of("evaluate"),
    threads: PLAN.config.train.threads
    log:
        "results/logs/evaluate/{arm}/seed{seed}.log",
    benchmark:
        "results/benchmarks/evaluate/{arm}/seed{seed}.tsv"
    resources:
        mem_mb=8000,
        runtime=120,
    shell:
        "{KVPIPE} evaluate {COMMON} --model {input[0]} --out {output} > {log} 2>&1"


rule teacher_quality:
    input:
        "results/models/{teacher}/MANIFEST.json",
        split_file("test"),
    output:
        "results/teacher_quality/{teacher}.parquet",
    params:
        settings=settings_of("evaluate"),
        code=code_of("evaluate"),
    log:
        "results/logs/teacher_quality/{teacher}.log",
    benchmark:
        "results/benchmarks/teacher_quality/{teacher}.tsv"
    resources:
        mem_mb=16000,
        runtime=240,
    shell:
        "{KVPIPE} evaluate {COMMON} --model results/models/{wildcards.teacher} --out {output} > {log} 2>&1"


rule untrained:
    input:
        manifest(PLAN.config.student),
        split_file("test"),
    output:
        "results/evaluate/untrained.parquet",
    params:
        settings=settings_of("untrained"),
        code=code_of("evaluate"),
    log:
        "results/logs/evaluate/untrained.log",
    benchmark:
        "results/benchmarks/evaluate/untrained.tsv"
    resources:
        mem_mb=8000,
        runtime=120,
    shell:
        "{KVPIPE} untrained {COMMON} --out {output} > {log} 2>&1"


rule arm:
    input:
        arm_cells,
    output:
        "results/arms/{arm}.csv",
    params:
        settings=settings_of("arm"),
        code=code_of("tables"),
    log:
        "results/logs/arms/{arm}.log",
    benchmark:
        "results/benchmarks/arms/{arm}.tsv"
    resources:
        mem_mb=2000,
        runtime=10,
    shell:
        "{KVPIPE} arm {COMMON} --arm {wildcards.arm} > {log} 2>&1"
