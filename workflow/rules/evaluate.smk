rule evaluate:
    input:
        model="results/train/{arm}/seed{seed}/model",
        data=split_file("test"),
    output:
        "results/evaluate/{arm}/seed{seed}.parquet",
    log:
        "results/logs/evaluate/{arm}/seed{seed}.log",
    benchmark:
        "results/benchmarks/evaluate/{arm}/seed{seed}.tsv"
    threads: PLAN.config.train.threads
    resources:
        mem_mb=8000,
        runtime=120,
    params:
        settings=settings_of("evaluate"),
        code=code_of("evaluate.score"),
    shell:
        "python -m kvpipe evaluate --model {input.model} --out {output} > {log} 2>&1"


rule lm_eval:
    input:
        "results/train/{arm}/seed{seed}/model",
    output:
        "results/lm_eval/{arm}/seed{seed}.json",
    log:
        "results/logs/lm_eval/{arm}/seed{seed}.log",
    benchmark:
        "results/benchmarks/lm_eval/{arm}/seed{seed}.tsv"
    threads: PLAN.config.train.threads
    resources:
        mem_mb=16000,
        runtime=240,
    params:
        settings=settings_of("lm_eval"),
        code=code_of("evaluate.harness"),
    shell:
        "python -m kvpipe lm-eval --model {input} --out {output} > {log} 2>&1"


rule teacher_quality:
    input:
        "results/models/{teacher}/MANIFEST.json",
        split_file("test"),
    output:
        "results/teacher_quality/{teacher}.parquet",
    log:
        "results/logs/teacher_quality/{teacher}.log",
    benchmark:
        "results/benchmarks/teacher_quality/{teacher}.tsv"
    threads: PLAN.config.train.threads
    resources:
        mem_mb=16000,
        runtime=240,
    params:
        settings=settings_of("evaluate"),
        code=code_of("evaluate.score"),
    shell:
        "python -m kvpipe evaluate --model results/models/{wildcards.teacher} --out {output} > {log} 2>&1"


rule untrained:
    input:
        manifest(PLAN.config.student),
        split_file("test"),
    output:
        "results/evaluate/untrained.parquet",
    log:
        "results/logs/evaluate/untrained.log",
    benchmark:
        "results/benchmarks/evaluate/untrained.tsv"
    threads: PLAN.config.train.threads
    resources:
        mem_mb=8000,
        runtime=120,
    params:
        settings=settings_of("untrained"),
        code=code_of("evaluate.score"),
    shell:
        "python -m kvpipe untrained --out {output} > {log} 2>&1"


rule arm:
    input:
        arm_cells,
    output:
        "results/arms/{arm}.csv",
    log:
        "results/logs/arms/{arm}.log",
    benchmark:
        "results/benchmarks/arms/{arm}.tsv"
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        settings=settings_of("arm"),
        code=code_of("stats.tables"),
    shell:
        "python -m kvpipe arm --arm {wildcards.arm} > {log} 2>&1"
