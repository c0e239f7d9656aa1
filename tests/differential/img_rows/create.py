"""Rows of `create`. Not here: a backing file that is backed by itself; qemu-img looks at that for ever."""

from __future__ import annotations

from tests.differential.img_matrix import Row, rows

ROWS = (
    *rows("""
        create
        create new
        create new 1M
        create new 1M extra
        create -f raw new 1M
        create -q -f raw new 1M
        create -f qcow2 new 1M
        create -q -f qcow2 new 1M
        create -f qcow2 new
        create -f qcow2
        create 1M
        create -f
        create -f nothing new 1M
        create -f nothing
        create -f file new 1M
        create -f null-co new 1M
        create -f blkdebug new 1M
        create -f '' new 1M
        create -f qcow2 -f raw new 1M
        create --format qcow2 new 1M
        create --format=qcow2 new 1M
        create -x new 1M
        create --nonsense new 1M
        create -qf raw new 1M
        create -qfraw new 1M
        create new -f qcow2 1M -q
        create new -- -1
        create -- new 1M
        create -f qcow2 '' 1M
        create -f qcow2 ' ' 1M
        create . 1M
        create -f qcow2 . 1M
        create nowhere/new 1M
        create -f qcow2 nowhere/new 1M
        create /proc/new 1M
        create nothing:new 1M
        create file:new 1M
        create -f qcow2 file:new 1M
        create ./a:b 1M
        create -f qcow2 a,b 1M
        create -f qcow2 'with space' 1M
        create -f qcow2 'ünïcode' 1M
        create 'json:{"driver":"file","filename":"new"}' 1M
        create -f qcow2 'json:{"driver":"file","filename":"new"}' 1M
        create disk.qcow2 1M
        create -f qcow2 disk.qcow2 2M
        create -f qcow2 disk.raw 2M
    """),
    # Sizes.
    *rows("""
        create new 0
        create -f qcow2 new 0
        create new 1
        create -f qcow2 new 1
        create -f qcow2 new 511
        create -f qcow2 new 513
        create new 1000
        create -f qcow2 new 1000
        create -f qcow2 new 1b
        create -f qcow2 new 1k
        create -f qcow2 new 1K
        create -f qcow2 new 1.5K
        create -f qcow2 new 1.0001K
        create -f qcow2 new .5M
        create -f qcow2 new 1M1
        create -f qcow2 new 1MB
        create -f qcow2 new 1MiB
        create -f qcow2 new 0x100000
        create -f qcow2 new 0x1M
        create -f qcow2 new 010
        create -f qcow2 new +1M
        create -f qcow2 new -- -1M
        create -f qcow2 new ''
        create -f qcow2 new ' 1M'
        create -f qcow2 new '1M '
        create -f qcow2 new x
        create -f qcow2 new 1x
        create -f qcow2 new 1e3
        create -f qcow2 new nan
        create -f qcow2 new inf
        create -f qcow2 new 1T
        create -f qcow2 new 2P
        create -f qcow2 new 1E
        create -f qcow2 new 7E
        create -f qcow2 new 8E
        create -f qcow2 new 9223372036854775808
        create -f qcow2 new 18446744073709551615
        create -f qcow2 new 18446744073709551616
        create -f qcow2 -o cluster_size=512 new 1T
        create -f qcow2 -o size=2M new
        create -f qcow2 -o size=2M new 1M
        create -o size=2M new
        create new 8E
        create new 1P
    """),
    # Options of raw.
    *rows("""
        create -o preallocation=off new 1M
        create -o preallocation=falloc new 1M
        create -o preallocation=full new 1M
        create -o preallocation=nonsense new 1M
        create -o extent_size_hint=-1 new 1M
        create -o nocow=on new 1M
        create -o nocow=maybe new 1M
        create -o nonsense=1 new 1M
        create -o nonsense new 1M
        create -o '' new 1M
        create -o , new 1M
        create -o size=1M, new
        create -o cluster_size=4k new 1M
        create -o backing_file=disk.raw new 1M
        create -b disk.raw new 1M
        create -b disk.raw -F raw new 1M
        create -o help
        create -o help new 1M
        create -o '?' new
        create -o size=1M,help new
        create -o help,size=1M new
        create -o help -o size=1M new
    """),
    # Options of qcow2.
    *rows("""
        create -f qcow2 -o help
        create -f qcow2 -o help new 1M
        create -f qcow2 -o '?' new
        create -f nothing -o help
        create -f bochs -o help
        create -f bochs new 1M
        create -f null-co -o help
        create -f qcow2 -o compat=0.10 new 1M
        create -f qcow2 -o compat=1.1 new 1M
        create -f qcow2 -o compat=v2 new 1M
        create -f qcow2 -o compat=v3 new 1M
        create -f qcow2 -o compat=0.42 new 1M
        create -f qcow2 -o compat= new 1M
        create -f qcow2 -o compat new 1M
        create -f qcow2 -o version=v2 new 1M
        create -f qcow2 -o cluster_size=4k new 1M
        create -f qcow2 -o cluster_size=512 new 1M
        create -f qcow2 -o cluster_size=2M new 1M
        create -f qcow2 -o cluster_size=4M new 1M
        create -f qcow2 -o cluster_size=256 new 1M
        create -f qcow2 -o cluster_size=0 new 1M
        create -f qcow2 -o cluster_size=1000 new 1M
        create -f qcow2 -o cluster_size=-1 new 1M
        create -f qcow2 -o cluster_size=x new 1M
        create -f qcow2 -o cluster_size= new 1M
        create -f qcow2 -o cluster_size=64k,cluster_size=4k new 1M
        create -f qcow2 -o cluster_size=64k -o cluster_size=4k new 1M
        create -f qcow2 -o cluster_size=64k -o compat=0.10 new 1M
        create -f qcow2 -o preallocation=off new 1M
        create -f qcow2 -o preallocation=metadata new 1M
        create -f qcow2 -o preallocation=falloc new 1M
        create -f qcow2 -o preallocation=full new 1M
        create -f qcow2 -o preallocation=none new 1M
        create -f qcow2 -o preallocation=full -b base.qcow2 -F qcow2 new
        create -f qcow2 -o preallocation=metadata -b base.qcow2 -F qcow2 new
        create -f qcow2 -o preallocation=metadata,extended_l2=on -b base.qcow2 -F qcow2 new
        create -f qcow2 -o lazy_refcounts=on new 1M
        create -f qcow2 -o lazy_refcounts=off new 1M
        create -f qcow2 -o lazy_refcounts=on,compat=0.10 new 1M
        create -f qcow2 -o lazy_refcounts=perhaps new 1M
        create -f qcow2 -o lazy_refcounts=yes new 1M
        create -f qcow2 -o lazy_refcounts new 1M
        create -f qcow2 -o nolazy_refcounts new 1M
        create -f qcow2 -o refcount_bits=1 new 1M
        create -f qcow2 -o refcount_bits=64 new 1M
        create -f qcow2 -o refcount_bits=128 new 1M
        create -f qcow2 -o refcount_bits=0 new 1M
        create -f qcow2 -o refcount_bits=3 new 1M
        create -f qcow2 -o refcount_bits=x new 1M
        create -f qcow2 -o refcount_bits=8,compat=0.10 new 1M
        create -f qcow2 -o extended_l2=on new 1M
        create -f qcow2 -o extended_l2=on,cluster_size=4k new 1M
        create -f qcow2 -o extended_l2=on,compat=0.10 new 1M
        create -f qcow2 -o compression_type=zlib new 1M
        create -f qcow2 -o compression_type=zstd new 1M
        create -f qcow2 -o compression_type=lzma new 1M
        create -f qcow2 -o compression_type=zstd,compat=0.10 new 1M
        create -f qcow2 -o compression_type=zlib,compat=0.10 new 1M
        create -f qcow2 -o data_file=data new 1M
        create -f qcow2 -o data_file=data,data_file_raw=on new 1M
        create -f qcow2 -o data_file_raw=on new 1M
        create -f qcow2 -o data_file=data,compat=0.10 new 1M
        create -f qcow2 -o data_file=data,data_file_raw=on,preallocation=full new 1M
        create -f qcow2 -o data_file=data,data_file_raw=on -b base.qcow2 -F qcow2 new
        create -f qcow2 -o data_file=nowhere/data new 1M
        create -f qcow2 -o data_file=disk.raw new 1M
        create -f qcow2 -o data_file= new 1M
        create -f qcow2 -o nonsense=1 new 1M
        create -f qcow2 -o =1 new 1M
        create -f qcow2 -o compat=1.1, new 1M
        create -f qcow2 -o ,compat=1.1 new 1M
        create -f qcow2 -o compat=1.1,,x new 1M
        create -f qcow2 -o '' new 1M
        create -f qcow2 -o nocow=on new 1M
    """),
    # Backing files.
    *rows("""
        create -f qcow2 -b base.qcow2 -F qcow2 new
        create -q -f qcow2 -b base.qcow2 -F qcow2 new
        create -f qcow2 -F qcow2 -b base.qcow2 new 2M
        create -f qcow2 -F qcow2 -b base.qcow2 new 512k
        create -f qcow2 -b base.qcow2 new
        create -f qcow2 -b disk.raw new
        create -f qcow2 -b disk.raw -F raw new
        create -f qcow2 -b disk.raw -F qcow2 new
        create -f qcow2 -b base.qcow2 -F raw new
        create -f qcow2 -b base.qcow2 -F nothing new
        create -f qcow2 -b base.qcow2 -F '' new
        create -f qcow2 -b '' new 1M
        create -f qcow2 -b '' -F qcow2 new 1M
        create -f qcow2 -F qcow2 new 1M
        create -f qcow2 -u -F qcow2 new 1M
        create -f qcow2 -b nowhere -F qcow2 new
        create -f qcow2 -b nowhere -F qcow2 new 1M
        create -f qcow2 -b nowhere new 1M
        create -f qcow2 -u -b nowhere -F qcow2 new 1M
        create -f qcow2 -u -b nowhere -F qcow2 new
        create -f qcow2 -u -b nowhere new 1M
        create -f qcow2 -b . -F qcow2 new
        create -f qcow2 -b new -F qcow2 new 1M
        create -f qcow2 -b bad-magic.qcow2 -F qcow2 new
        create -f qcow2 -b feature.qcow2 -F qcow2 new
        create -f qcow2 -b orphan.qcow2 -F qcow2 new
        create -f qcow2 -b empty.raw -F raw new
        create -f qcow2 -b odd.raw -F raw new
        create -f qcow2 -b 'json:{"driver":"qcow2","file":{"filename":"base.qcow2"}}' -F qcow2 new
        create -f qcow2 -b 'json:{"driver":"qcow2","file":{"driver":"file","filename":"base.qcow2"}}' -F qcow2 new
        create -f qcow2 -b file:base.qcow2 -F qcow2 new
        create -f qcow2 -b 'a,b.raw' -F raw new
        create -f qcow2 -b 'with space.raw' -F raw new
        create -f qcow2 -b 'ünïcode.raw' -F raw new
        create -f qcow2 -b 'a:b.raw' -F raw new
        create -f qcow2 -b './a:b.raw' -F raw new
        create -f qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 new
        create -f qcow2 -o backing_file=base.qcow2 new
        create -f qcow2 -o backing_fmt=qcow2 new 1M
        create -f qcow2 -b base.qcow2 -F qcow2 -o backing_file=disk.raw new
        create -f qcow2 -b base.qcow2 -o backing_fmt=raw new
        create -f qcow2 -b base.qcow2 -b disk.raw -F raw new
        create -f qcow2 -o compat=0.10 -b base.qcow2 -F qcow2 new
        create -f qcow2 -o cluster_size=512 -b base.qcow2 -F qcow2 new
        create -f qcow2 -o extended_l2=on -b base.qcow2 -F qcow2 new
        create -f qcow2 -o cluster_size=512 -b large.raw -F raw new
    """),
    # Objects.
    *rows("""
        create --object nothing,id=a new 1M
        create --object throttle-group,id=a new 1M
        create --object throttle-group new 1M
        create --object throttle-group,id=a --object throttle-group,id=a new 1M
        create --object '' new 1M
    """),
    Row("create -f qcow2 new 1M", process=True),
    Row("create -f qcow2 new 1M", on_disk=True),
    Row("create new 1M", on_disk=True),
    Row("create -f qcow2 -b base.qcow2 -F qcow2 new", held="qemu-io base.qcow2"),
    Row("create -f qcow2 -b base.qcow2 -F qcow2 new", held="qemu-io -r base.qcow2"),
    Row("create -f qcow2 ro/new 1M", given=["mkdir ro", "ln -s /nowhere/x ro/new"]),
    Row("create -f qcow2 new 1M", given=["mkdir new"]),
    Row("create -f qcow2 new 1M", given=["truncate -s 5M new"]),
    Row("create new 1M", given=["truncate -s 5M new", "poke new 0 ff"]),
    *rows(
        """
        create --help
        create -h
        """,
        differs="help texts are our own",
    ),
    *rows(
        """
        create -f qcow2 -o encryption=on new 1M
        create -f qcow2 -o encrypt.format=luks new 1M
        create -f qcow2 -o encrypt.format=nonsense new 1M
        create --object secret,id=sec0,data=abc -f qcow2 new 1M
        create --object secret -f qcow2 new 1M
        create --object secret,id=s,data=a,file=b new 1M
        create --object secret,id=s,file=/nonexistent new 1M
        create --object secret,id=s,file=/tmp new 1M
        create --object secret,id=s,data=a,format=nope new 1M
        create --object secret,id=s,data=%%,format=base64 new 1M
        create --object secret,id=s,data=a,keyid=k new 1M
        create --object secret,id=k,data=a --object secret,id=s,data=a,keyid=k new 1M
        create --object secret,id=s,data=a --object secret,id=s,data=a new 1M
        create --object secret,data=a new 1M
        create --object secret,id=s,data=a,foo=1 new 1M
        create --object secret,id=s,data=a,loaded=on new 1M
        create --object secret,id=1,data=a new 1M
        create --object secret,id=s,data=a -f qcow2 -o encryption=on,encrypt.key-secret=s new 1M
        create --object secret,id=s,data=a -f qcow2 -o encrypt.format=aes,encrypt.key-secret=s new 1M
        create --object secret,id=s,data=/w==,format=base64 -f qcow2 -o encryption=on,encrypt.key-secret=s new 1M
        create -f qcow2 -o encrypt.format=luks,encrypt.key-secret=x new 1M
        create -f qcow2 -o encrypt.format=aes,encrypt.key-secret=x,encrypt.iter-time=10 new 1M
        create -f qcow2 -o encrypt.key-secret=x new 1M
        create -f qcow2 -o encryption=on,encrypt.format=luks new 1M
        create -f qcow2 -o encrypt.format=luks,encrypt.cipher-alg=foo new 1M
        create --object secret,id=s,data=a -f luks -o key-secret=s,cipher-alg=3des new 1M
        create -f qcow2 -o encrypt.format=luks,encrypt.hash-alg=foo new 1M
        create -f qcow2 -o encrypt.format=luks,encrypt.ivgen-alg=foo new 1M
        create -f luks new 1M
        create -f luks -o help
        create -f luks -o key-secret=x new 1M
        create -f luks -o cipher-alg=foo new 1M
        """,
    ),
    *rows("""
        create -o extent_size_hint=1M new 1M
        create -f qcow2 -o extent_size_hint=1M new 1M
        create -f qcow2 -o refcount_bits=-1 new 1M
        create -f qcow2 -u -F nothing new 1M
        create -f qcow2 -u -b nowhere -F nothing new 1M
    """),
    *rows(
        """
        create -f qcow2 new 9223372036854775807
        create new 9223372036854775807
        """,
        differs="a size that overflows when it is rounded is too large",
    ),
    Row("create -o preallocation=metadata new 1M", differs="no empty file is left behind"),
    Row("create -f host_device new 1M"),
    Row("create -f qcow2 disk.qcow2 2M", held="qemu-io -f qcow2 disk.qcow2"),
    Row("create -f qcow2 disk.qcow2 2M", held="qemu-io -r -f qcow2 disk.qcow2"),
    *(
        Row(command, held=held, differs="a file that another process has is left alone")
        for command, held in (("create disk.raw 2M", "qemu-io -f raw disk.raw"),)
    ),
    Row(
        "create -f qcow2 link 1M",
        given=["ln -s target link"],
        differs="a link to nothing is no place for a file",
    ),
)
