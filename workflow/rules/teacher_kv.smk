rule layer_map:
    input:
        PATHS.manifest("{teacher}"),
        PATHS.manifest(PLAN.config.student),
        PATHS.data("train"),
        PATHS.data("validation"),
    output:
        PATHS.layer_map("{teacher}"),
    log:
        PATHS.log("layer_map/{teacher}"),
    benchmark:
        PATHS.benchmark("layer_map/{teacher}")
    resources:
        mem_mb=16000,
        runtime=60,
    params:
        settings=settings_of("layer_map"),
        code=code_of("steps.layer_map"),
    shell:
        "python -m kvpipe layer-map --teacher {wildcards.teacher} > {log} 2>&1"


rule teacher_kv_shard:
    input:
        shard_inputs,
    output:
        PATHS.shard("{teacher}", "{reading}", "{shard}"),
    log:
        PATHS.log("teacher_kv/{teacher}-{reading}-{shard}"),
    benchmark:
        PATHS.benchmark("teacher_kv/{teacher}-{reading}-{shard}")
    resources:
        mem_mb=16000,
        runtime=240,
    params:
        settings=settings_of("teacher_kv", "teacher"),
        code=code_of("steps.teacher_kv"),
    shell:
        "python -m kvpipe teacher-kv --teacher {wildcards.teacher} --reading {wildcards.reading}"
        " --shard {wildcards.shard} > {log} 2>&1"


rule teacher_kv:
    input:
        index_inputs,
    output:
        PATHS.store_index("{teacher}", "{reading}"),
    log:
        PATHS.log("teacher_kv/{teacher}-{reading}"),
    benchmark:
        PATHS.benchmark("teacher_kv/{teacher}-{reading}")
    resources:
        mem_mb=16000,
        runtime=240,
    params:
        settings=settings_of("teacher_kv", "teacher"),
        code=code_of("steps.teacher_kv"),
    shell:
        "python -m kvpipe teacher-kv --teacher {wildcards.teacher} --reading {wildcards.reading} > {log} 2>&1"


rule fit:
    input:
        fit_inputs,
    output:
        PATHS.projector("{fit}"),
        PATHS.fit_report("{fit}"),
    log:
        PATHS.log("fit/{fit}"),
    benchmark:
        PATHS.benchmark("fit/{fit}")
    resources:
        mem_mb=16000,
        runtime=60,
    params:
        settings=settings_of("fit", "fit"),
        code=code_of("steps.fit"),
    shell:
        "python -m kvpipe fit --fit {wildcards.fit} > {log} 2>&1"
