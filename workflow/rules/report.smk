rule audit:
    input:
        items_of(PLAN.arms),
        histories_of(PLAN.arms),
        PATHS.data("train"),
        PATHS.data("test"),
    output:
        PATHS.audit,
    log:
        PATHS.log("audit"),
    benchmark:
        PATHS.benchmark("audit")
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
        untrained=PATHS.untrained,
    output:
        PATHS.tables,
    log:
        PATHS.log("stats"),
    benchmark:
        PATHS.benchmark("stats")
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
        PATHS.tables,
        PATHS.audit,
        items_of(PLAN.arms),
        histories_of(PLAN.arms),
        [PATHS.arm_table(arm) for arm in PLAN.arms],
        lm_eval_results(),
        [PATHS.fit_report(fit) for fit in PLAN.fits],
        [PATHS.teacher_quality(teacher) for teacher in judged_teachers()],
        [PATHS.layer_map(teacher) for teacher in PLAN.mapped_teachers],
    output:
        report(PATHS.report, caption="../report/report.rst", category="Report"),
    log:
        PATHS.log("report"),
    benchmark:
        PATHS.benchmark("report")
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        settings=settings_of("report"),
        code=code_of("report.render"),
    shell:
        "python -m kvpipe report --out {output} > {log} 2>&1"
