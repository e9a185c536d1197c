rule evaluate:
    input:
        needs("evaluate"),
    output:
        **makes("evaluate"),
    log:
        PATHS.log("evaluate/{arm}/seed{seed}"),
    benchmark:
        PATHS.benchmark("evaluate/{arm}/seed{seed}")
    threads: PLAN.config.train.threads
    resources:
        mem_mb=memory("evaluate", 8000),
        runtime=120,
    params:
        settings=settings("evaluate"),
        code=code("evaluate"),
        model=str(PATHS.student("{arm}", "{seed}")),
    shell:
        "python -m kvpipe evaluate --model {params.model} --out {output} > {log} 2>&1"


rule lm_eval:
    input:
        needs("lm_eval"),
    output:
        **makes("lm_eval"),
    log:
        PATHS.log("lm_eval/{arm}/seed{seed}"),
    benchmark:
        PATHS.benchmark("lm_eval/{arm}/seed{seed}")
    threads: PLAN.config.train.threads
    resources:
        mem_mb=memory("lm_eval", 16000),
        runtime=240,
    params:
        settings=settings("lm_eval"),
        code=code("lm_eval"),
        model=str(PATHS.student("{arm}", "{seed}")),
    shell:
        "python -m kvpipe lm-eval --model {params.model} --out {output} > {log} 2>&1"


rule teacher_quality:
    input:
        needs("teacher_quality"),
    output:
        **makes("teacher_quality"),
    log:
        PATHS.log("teacher_quality/{teacher}"),
    benchmark:
        PATHS.benchmark("teacher_quality/{teacher}")
    threads: PLAN.config.train.threads
    resources:
        mem_mb=memory("teacher_quality", 16000),
        runtime=240,
    params:
        settings=settings("teacher_quality"),
        code=code("teacher_quality"),
        model=subpath(input[0], parent=True),
    shell:
        "python -m kvpipe evaluate --model {params.model} --out {output} > {log} 2>&1"


rule untrained:
    input:
        needs("untrained"),
    output:
        **makes("untrained"),
    log:
        PATHS.log("evaluate/untrained"),
    benchmark:
        PATHS.benchmark("evaluate/untrained")
    threads: PLAN.config.train.threads
    resources:
        mem_mb=memory("untrained", 8000),
        runtime=120,
    params:
        settings=settings("untrained"),
        code=code("untrained"),
    shell:
        "python -m kvpipe untrained --out {output} > {log} 2>&1"


rule arm:
    input:
        needs("arm"),
    output:
        **makes("arm"),
    log:
        PATHS.log("arms/{arm}"),
    benchmark:
        PATHS.benchmark("arms/{arm}")
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        settings=settings("arm"),
        code=code("arm"),
    shell:
        "python -m kvpipe arm --arm {wildcards.arm} > {log} 2>&1"
