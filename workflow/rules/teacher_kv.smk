rule layer_map:
    input:
        "results/models/{teacher}/MANIFEST.json",
        manifest(PLAN.config.student),
        split_file("train"),
        split_file("validation"),
    output:
        "results/layer_map/{teacher}.json",
    log:
        "results/logs/layer_map/{teacher}.log",
    benchmark:
        "results/benchmarks/layer_map/{teacher}.tsv"
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
        "results/teacher_kv/{teacher}/{reading}/shard-{shard}.safetensors",
    log:
        "results/logs/teacher_kv/{teacher}-{reading}-{shard}.log",
    benchmark:
        "results/benchmarks/teacher_kv/{teacher}-{reading}-{shard}.tsv"
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
        "results/teacher_kv/{teacher}/{reading}/index.json",
    log:
        "results/logs/teacher_kv/{teacher}-{reading}.log",
    benchmark:
        "results/benchmarks/teacher_kv/{teacher}-{reading}.tsv"
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
        "results/projector/{fit}.safetensors",
        "results/projector/{fit}.json",
    log:
        "results/logs/fit/{fit}.log",
    benchmark:
        "results/benchmarks/fit/{fit}.tsv"
    resources:
        mem_mb=16000,
        runtime=60,
    params:
        settings=settings_of("fit", "fit"),
        code=code_of("steps.fit"),
    shell:
        "python -m kvpipe fit --fit {wildcards.fit} > {log} 2>&1"
