rule model:
    input:
        needs("model"),
    output:
        **makes("model"),
    log:
        PATHS.log("models/{model}"),
    benchmark:
        PATHS.benchmark("models/{model}")
    resources:
        mem_mb=8000,
        runtime=120,
    params:
        settings=settings("model"),
        code=code("model"),
    shell:
        "python -m kvpipe models --name {wildcards.model} > {log} 2>&1"


rule encode:
    input:
        needs("encode"),
    output:
        **makes("encode"),
    log:
        PATHS.log("encode/{model}-{reading}"),
    benchmark:
        PATHS.benchmark("encode/{model}-{reading}")
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        settings=settings("encode"),
        code=code("encode"),
    shell:
        "python -m kvpipe encode --model {wildcards.model} --reading {wildcards.reading} > {log} 2>&1"
