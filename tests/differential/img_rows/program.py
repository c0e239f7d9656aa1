"""Rows of the command line as a whole: what stands before a subcommand, options and how they are written, objects."""

from __future__ import annotations

from tests.differential.img_matrix import Row, rows

ROWS = (
    Row(""),
    *rows("""
        -
        --
        -Z
        -ZV
        --foo
        --foo=1
        --version=1
        -T
        --trace
        -T foo
        -T foo -T bar
        -T -foo
        -T 'foo*'
        -T enable=foo
        -T what=1
        -T foo create
        nosuch
        nosuch --help
        '' x
        -- create
        --trace foo create
        --tra=foo create
    """),
    *rows("""
        create --foo
        create -Z
        create -Zq
        create -qZ
        create x -Zq
        create -q x -Zq
        create x y -qZq
        create -f
        create -qf
        create x -f
        create --object
        create --obj
        create --help=1
        create --object=foo x 1M
        create -- -q 1M
        create -f raw -- new 1M
        create new -f raw 1M -q
        create new 1M more
        create -fraw new 1M
        create -qfraw new 1M
        create -qfqcow2 -oextended_l2=on new 1M
        create - 1M
        snapshot --image new.qcow2 -l
        info --ou json
        info --b
    """),
    *rows("""
        create --object foo new 1M
        create --object id=a new 1M
        create --object '' new 1M
        create --object throttle-group new 1M
        create --object throttle-group,id=a -q new 1M
        create --object throttle-group,id=a,foo=1 new 1M
        create --object throttle-group,id=1a new 1M
        create --object throttle-group,id=a,limits.iops-total=5 -q new 1M
        create --object qom-type=throttle-group,id=a -q new 1M
        create --object foo
        create --object foo --wrong
        create --wrong --object foo
    """),
)
