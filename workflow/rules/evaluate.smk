rule evaluate:
    input:
        model=PATHS.student("{arm}", "{seed}"),
        data=PATHS.data("test"),
    output:
        PATHS.items("{arm}", "{seed}"),
    log:
        PATHS.log("evaluate/{arm}/seed{seed}"),
    benchmark:
        PATHS.benchmark("evaluate/{arm}/seed{seed}")
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
        PATHS.student("{arm}", "{seed}"),
    output:
        PATHS.lm_eval("{arm}", "{seed}"),
    log:
        PATHS.log("lm_eval/{arm}/seed{seed}"),
    benchmark:
        PATHS.benchmark("lm_eval/{arm}/seed{seed}")
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
        PATHS.manifest("{teacher}"),
        PATHS.data("test"),
    output:
        PATHS.teacher_quality("{teacher}"),
    log:
        PATHS.log("teacher_quality/{teacher}"),
    benchmark:
        PATHS.benchmark("teacher_quality/{teacher}")
    threads: PLAN.config.train.threads
    resources:
        mem_mb=16000,
        runtime=240,
    params:
        settings=settings_of("evaluate"),
        code=code_of("evaluate.score"),
        model=subpath(input[0], parent=True),
    shell:
        "python -m kvpipe evaluate --model {params.model} --out {output} > {log} 2>&1"


rule untrained:
    input:
        PATHS.manifest(PLAN.config.student),
        PATHS.data("test"),
    output:
        PATHS.untrained,
    log:
        PATHS.log("evaluate/untrained"),
    benchmark:
        PATHS.benchmark("evaluate/untrained")
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
        PATHS.arm_table("{arm}"),
    log:
        PATHS.log("arms/{arm}"),
    benchmark:
        PATHS.benchmark("arms/{arm}")
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        settings=settings_of("arm"),
        code=code_of("stats.tables"),
    shell:
        "python -m kvpipe arm --arm {wildcards.arm} > {log} 2>&1"
