rule model:
    input:
        model_inputs,
    output:
        "results/models/{model}/MANIFEST.json",
    log:
        "results/logs/models/{model}.log",
    benchmark:
        "results/benchmarks/models/{model}.tsv"
    resources:
        mem_mb=8000,
        runtime=120,
    params:
        settings=settings_of("models", "model"),
        code=code_of("steps.models"),
    shell:
        "python -m kvpipe models --name {wildcards.model} > {log} 2>&1"
