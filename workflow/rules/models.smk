rule model:
    input:
        model_inputs,
        doctor=ancient("results/doctor.json"),
    output:
        "results/models/{model}/MANIFEST.json",
    params:
        settings=settings_of("models", "model"),
        code=code_of("steps.models"),
    log:
        "results/logs/models/{model}.log",
    benchmark:
        "results/benchmarks/models/{model}.tsv"
    resources:
        mem_mb=8000,
        runtime=120,
    shell:
        "{KVPIPE} models {COMMON} --name {wildcards.model} > {log} 2>&1"
