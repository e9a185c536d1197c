rule audit:
    input:
        items_of(PLAN.arms),
        histories_of(PLAN.arms),
        split_file("train"),
        split_file("test"),
    output:
        "results/audit.json",
    log:
        "results/logs/audit.log",
    benchmark:
        "results/benchmarks/audit.tsv"
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        settings=settings_of("audit"),
        code=code_of("stats.audit"),
    shell:
        "python -m kvpipe audit > {log} 2>&1"


rule stats:
    input:
        items_of(PLAN.arms),
        histories_of(PLAN.arms),
        untrained="results/evaluate/untrained.parquet",
    output:
        "results/stats/arms.csv",
        "results/stats/contrasts.csv",
        "results/cost/arms.csv",
        "results/cost/contrasts.csv",
    log:
        "results/logs/stats.log",
    benchmark:
        "results/benchmarks/stats.tsv"
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        settings=settings_of("stats"),
        code=code_of("stats.tables"),
    shell:
        "python -m kvpipe stats --untrained {input.untrained} > {log} 2>&1"


rule report:
    input:
        "results/stats/arms.csv",
        "results/stats/contrasts.csv",
        "results/cost/arms.csv",
        "results/audit.json",
        items_of(PLAN.arms),
        histories_of(PLAN.arms),
        expand("results/arms/{arm}.csv", arm=PLAN.arms),
        lm_eval_results(),
        expand("results/projector/{fit}.json", fit=PLAN.fits),
        expand("results/teacher_quality/{teacher}.parquet", teacher=judged_teachers()),
        expand("results/layer_map/{teacher}.json", teacher=PLAN.mapped_teachers),
    output:
        report("results/report.html", caption="../report/report.rst", category="Report"),
    log:
        "results/logs/report.log",
    benchmark:
        "results/benchmarks/report.tsv"
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        settings=settings_of("report"),
        code=code_of("report.render"),
    shell:
        "python -m kvpipe report --out {output} > {log} 2>&1"
