rule audit:
    input:
        needs("audit"),
    output:
        **makes("audit"),
    log:
        PATHS.log("audit"),
    benchmark:
        PATHS.benchmark("audit")
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        settings=settings("audit"),
        code=code("audit"),
    shell:
        "python -m kvpipe audit > {log} 2>&1"


rule stats:
    input:
        needs("stats"),
    output:
        **makes("stats"),
    log:
        PATHS.log("stats"),
    benchmark:
        PATHS.benchmark("stats")
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        settings=settings("stats"),
        code=code("stats"),
        untrained=str(PATHS.untrained),
    shell:
        "python -m kvpipe stats --untrained {params.untrained} > {log} 2>&1"


def captioned(step):
    """What the page's job writes; what `snakemake --report` shows of it has its caption in workflow/report."""
    files = makes(step)
    shown = {"page": report(files.pop("page"), caption="../report/report.rst", category="Report")}
    for name, path in files.items():
        kind, stem = name.partition("_")[0], name.rpartition("_")[0]
        if path.suffix in (".svg", ".csv"):
            category, labels = f"{kind.capitalize()}s", {kind: path.stem.replace("_", " ")}
            path = report(path, caption=f"../report/{stem}.rst", category=category, labels=labels)
        shown[name] = path
    return shown


rule report:
    input:
        needs("report"),
    output:
        **captioned("report"),
    log:
        PATHS.log("report"),
    benchmark:
        PATHS.benchmark("report")
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        settings=settings("report"),
        code=code("report"),
    shell:
        "python -m kvpipe report --out {output.page} > {log} 2>&1"
