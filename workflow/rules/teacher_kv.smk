rule teacher_text_shard:
    input:
        needs("teacher_text_shard"),
    output:
        **makes("teacher_text_shard"),
    log:
        PATHS.log("teacher_text/{teacher}-{shard}"),
    benchmark:
        PATHS.benchmark("teacher_text/{teacher}-{shard}")
    resources:
        mem_mb=memory("teacher_text_shard", 16000),
        runtime=240,
    params:
        settings=settings("teacher_text_shard"),
        code=code("teacher_text_shard"),
    shell:
        "python -m kvpipe teacher-text --teacher {wildcards.teacher} --shard {wildcards.shard} > {log} 2>&1"


rule teacher_text:
    input:
        needs("teacher_text"),
    output:
        **makes("teacher_text"),
    log:
        PATHS.log("teacher_text/{teacher}"),
    benchmark:
        PATHS.benchmark("teacher_text/{teacher}")
    resources:
        mem_mb=memory("teacher_text", 16000),
        runtime=240,
    params:
        settings=settings("teacher_text"),
        code=code("teacher_text"),
    shell:
        "python -m kvpipe teacher-text --teacher {wildcards.teacher} > {log} 2>&1"


rule layer_map:
    input:
        needs("layer_map"),
    output:
        **makes("layer_map"),
    log:
        PATHS.log("layer_map/{teacher}"),
    benchmark:
        PATHS.benchmark("layer_map/{teacher}")
    resources:
        mem_mb=memory("layer_map", 16000),
        runtime=60,
    params:
        settings=settings("layer_map"),
        code=code("layer_map"),
    shell:
        "python -m kvpipe layer-map --teacher {wildcards.teacher} > {log} 2>&1"


rule teacher_kv_shard:
    input:
        needs("teacher_kv_shard"),
    output:
        **makes("teacher_kv_shard"),
    log:
        PATHS.log("teacher_kv/{teacher}-{reading}-{shard}"),
    benchmark:
        PATHS.benchmark("teacher_kv/{teacher}-{reading}-{shard}")
    resources:
        mem_mb=memory("teacher_kv_shard", 16000),
        runtime=240,
    params:
        settings=settings("teacher_kv_shard"),
        code=code("teacher_kv_shard"),
    shell:
        "python -m kvpipe teacher-kv --teacher {wildcards.teacher} --reading {wildcards.reading}"
        " --shard {wildcards.shard} > {log} 2>&1"


rule teacher_kv:
    input:
        needs("teacher_kv"),
    output:
        **makes("teacher_kv"),
    log:
        PATHS.log("teacher_kv/{teacher}-{reading}"),
    benchmark:
        PATHS.benchmark("teacher_kv/{teacher}-{reading}")
    resources:
        mem_mb=memory("teacher_kv", 16000),
        runtime=240,
    params:
        settings=settings("teacher_kv"),
        code=code("teacher_kv"),
    shell:
        "python -m kvpipe teacher-kv --teacher {wildcards.teacher} --reading {wildcards.reading} > {log} 2>&1"


rule fit:
    input:
        needs("fit"),
    output:
        **makes("fit"),
    log:
        PATHS.log("fit/{fit}"),
    benchmark:
        PATHS.benchmark("fit/{fit}")
    resources:
        mem_mb=memory("fit", 16000),
        runtime=60,
    params:
        settings=settings("fit"),
        code=code("fit"),
    shell:
        "python -m kvpipe fit --fit {wildcards.fit} > {log} 2>&1"
