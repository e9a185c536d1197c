rule model:
    input:
        model_inputs,
    output:
        PATHS.manifest("{model}"),
    log:
        PATHS.log("models/{model}"),
    benchmark:
        PATHS.benchmark("models/{model}")
    resources:
        mem_mb=8000,
        runtime=120,
    params:
        settings=settings_of("models", "model"),
        code=code_of("steps.models"),
    shell:
        "python -m kvpipe models --name {wildcards.model} > {log} 2>&1"
