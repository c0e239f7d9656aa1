"""Rows of `convert`."""

from __future__ import annotations

from tests.differential.img_matrix import Row, rows

_CAN = "a cluster that has a place can be written compressed"
_OWN = "an image is not overwritten by what it is made from"
_FAILED = "nothing was copied, which is a failure"
_USED = "an image that somebody else has open is not made anew"

ROWS = (
    # What is written where.
    *rows("""
        convert disk.raw out
        convert -O raw disk.raw out
        convert -f raw -O raw disk.raw out
        convert -O qcow2 disk.raw out
        convert -f raw -O qcow2 disk.raw out
        convert -f qcow2 -O raw disk.qcow2 out
        convert -O qcow2 disk.qcow2 out
        convert empty.raw out
        convert -O qcow2 empty.raw out
        convert zeroes.raw out
        convert -O qcow2 zeroes.raw out
        convert odd.raw out
        convert -O qcow2 odd.raw out
        convert text.raw out
        convert 'with space.raw' 'an out'
        convert a,b.raw out
        convert a:b.raw out
        convert ./a:b.raw out
        convert v2.qcow2 out
        convert small-clusters.qcow2 out
        convert -O qcow2 -o cluster_size=512 small-clusters.qcow2 out
        convert subclusters.qcow2 out
        convert -O qcow2 -o extended_l2=on subclusters.qcow2 out
        convert compressed.qcow2 out
        convert zstd.qcow2 out
        convert external.qcow2 out
        convert -O qcow2 external.qcow2 out
        convert -O qcow2 -o data_file=out.data disk.qcow2 out
        convert -O qcow2 -o data_file=out.data,data_file_raw=on disk.qcow2 out
        convert top.qcow2 out
        convert -O qcow2 top.qcow2 out
        convert over-raw.qcow2 out
        convert bitmaps.qcow2 out
        convert -O qcow2 bitmaps.qcow2 out
        convert -O qcow2 -o preallocation=metadata disk.raw out
        convert -O qcow2 -o preallocation=falloc disk.raw out
        convert -O qcow2 -o preallocation=full disk.raw out
        convert -O raw -o preallocation=falloc disk.raw out
        convert -O qcow2 -o compat=0.10 disk.raw out
        convert -O qcow2 -o compat=0.10,cluster_size=4k disk.raw out
        convert -O qcow2 -o lazy_refcounts=on,refcount_bits=1 disk.raw out
    """),
    # Sparseness, order, workers.
    *rows("""
        convert -S 0 disk.raw out
        convert -S 0 -O qcow2 disk.raw out
        convert -S 0 -O qcow2 disk.qcow2 out
        convert -S 512 disk.raw out
        convert -S 512 -O qcow2 small-clusters.qcow2 out
        convert -S 4k disk.raw out
        convert -S 64k -O qcow2 disk.raw out
        convert -S 96k disk.raw out
        convert -S 16M disk.raw out
        convert -S 16385k disk.raw out
        convert -S 100 disk.raw out
        convert -S x disk.raw out
        convert -S -1 disk.raw out
        convert -m 1 disk.raw out
        convert -m 16 disk.raw out
        convert -m 0 disk.raw out
        convert -m 17 disk.raw out
        convert -m 0x10 disk.raw out
        convert -m 010 disk.raw out
        convert -m x disk.raw out
        convert -m 1k disk.raw out
        convert -m '' disk.raw out
        convert -W disk.raw out
        convert -W -m 1 -O qcow2 disk.raw out
        convert -C disk.raw out
        convert -C disk.qcow2 out
        convert -C -O qcow2 disk.raw out
        convert -C -S 4k disk.raw out
        convert -C -c -O qcow2 disk.raw out
        convert -C --salvage disk.raw out
        convert -r 1G disk.raw out
        convert -r x disk.raw out
        convert -r -5 disk.raw out
        convert -q disk.raw out
        convert -p -q disk.raw out
        convert -p zeroes.raw out
        convert -p nowhere out
    """),
    # Compression.
    *rows("""
        convert -c -O qcow2 disk.raw out
        convert -c -W -O qcow2 disk.raw out
        convert -c -O qcow2 disk.qcow2 out
        convert -c -O qcow2 -o cluster_size=4k disk.raw out
        convert -c -O qcow2 -o cluster_size=2M disk.raw out
        convert -c -O qcow2 -o compression_type=zlib odd.raw out
        convert -c -S 0 -O qcow2 zeroes.raw out
        convert -c -O qcow2 compressed.qcow2 out
        convert -c -O raw disk.raw out
        convert -c disk.raw out
        convert -c -n -O raw disk.raw short.raw
        convert -c -O qcow2 -o preallocation=metadata disk.raw out
        convert -c -O qcow2 -o preallocation=off disk.raw out
        convert -c -O qcow2 -o data_file=out.data disk.raw out
        convert -c -O qcow2 disk.raw short.raw out
    """),
    # Backing files.
    *rows("""
        convert -O qcow2 -B mid.qcow2 -F qcow2 top.qcow2 out
        convert -O qcow2 -B base.qcow2 -F qcow2 top.qcow2 out
        convert -O qcow2 -o backing_file=mid.qcow2,backing_fmt=qcow2 top.qcow2 out
        convert -O qcow2 -B mid.qcow2 top.qcow2 out
        convert -O qcow2 -o backing_file=mid.qcow2 top.qcow2 out
        convert -O qcow2 -F qcow2 top.qcow2 out
        convert -O qcow2 -B mid.qcow2 -F qcow2 -o backing_file=base.qcow2 top.qcow2 out
        convert -O qcow2 -B disk.raw -F raw over-raw.qcow2 out
        convert -O qcow2 -B short.raw -F raw over-raw.qcow2 out
        convert -O qcow2 -B short.raw -F raw top.qcow2 out
        convert -O qcow2 -B nowhere.qcow2 -F qcow2 top.qcow2 out
        convert -O qcow2 -B mid.qcow2 -F nothing top.qcow2 out
        convert -O qcow2 -B mid.qcow2 -F raw top.qcow2 out
        convert -O raw -B mid.qcow2 -F qcow2 top.qcow2 out
        convert -O raw -F qcow2 top.qcow2 out
        convert -O raw -o backing_file=mid.qcow2 top.qcow2 out
        convert -O qcow2 -c -B mid.qcow2 -F qcow2 top.qcow2 out
        convert -O qcow2 -S 0 -B mid.qcow2 -F qcow2 top.qcow2 out
        convert -O qcow2 -B mid.qcow2 -F qcow2 top.qcow2 disk.raw out
        convert -n -O qcow2 -B mid.qcow2 top.qcow2 disk.qcow2
        convert orphan.qcow2 out
        convert -O qcow2 -o compat=0.10 -B mid.qcow2 -F qcow2 top.qcow2 out
    """),
    # Several sources.
    *rows("""
        convert disk.raw short.raw out
        convert disk.raw short.raw odd.raw text.raw out
        convert odd.raw disk.raw out
        convert odd.raw odd.raw -O qcow2 out
        convert -O qcow2 disk.qcow2 top.qcow2 small-clusters.qcow2 out
        convert -c -O qcow2 odd.raw text.raw disk.raw out
        convert -l one snapshots.qcow2 disk.raw out
        convert disk.raw nowhere out
        convert -f raw disk.raw disk.qcow2 out
        convert -m 3 -W empty.raw disk.raw empty.raw out
    """),
    # Snapshots.
    *rows("""
        convert -l one snapshots.qcow2 out
        convert -l 2 snapshots.qcow2 out
        convert -l nothing snapshots.qcow2 out
        convert -l snapshot.id=1 snapshots.qcow2 out
        convert -l snapshot.name=two snapshots.qcow2 out
        convert -l snapshot.id=1,snapshot.name=one snapshots.qcow2 out
        convert -l snapshot.id=1,snapshot.name=two snapshots.qcow2 out
        convert -l snapshot.id=5 snapshots.qcow2 out
        convert -l snapshot.what=5 snapshots.qcow2 out
        convert -l snapshot. snapshots.qcow2 out
        convert -l one disk.raw out
        convert -l one disk.qcow2 out
        convert -l snapshot.name=one disk.raw out
        convert -O qcow2 -l one snapshots.qcow2 out
    """),
    # Targets that are there.
    *rows("""
        convert disk.raw zeroes.raw
        convert -O qcow2 disk.raw zeroes.raw
        convert -n disk.raw zeroes.raw
        convert -n disk.raw short.raw
        convert -n disk.raw nowhere
        convert -n disk.raw empty.raw
        convert -n short.raw disk.raw
        convert -n zeroes.raw disk.raw
        convert -n -S 0 zeroes.raw disk.raw
        convert -n -O qcow2 disk.raw new.qcow2
        convert -n -O qcow2 zeroes.raw disk.qcow2
        convert -n -O qcow2 short.raw disk.qcow2
        convert -n -O qcow2 disk.raw v2.qcow2
        convert -n -O qcow2 disk.raw top.qcow2
        convert -n -O qcow2 disk.raw subclusters.qcow2
        convert -n -O qcow2 disk.raw compressed.qcow2
        convert -n -O qcow2 disk.raw snapshots.qcow2
        convert -n -O qcow2 disk.raw zeroes.raw
        convert -n -O qcow2 disk.raw bad-magic.qcow2
        convert -n -O qcow2 disk.raw corrupt.qcow2
        convert -n -O raw disk.raw new.qcow2
        convert -n --target-is-zero disk.raw zeroes.raw
        convert -n --target-is-zero zeroes.raw disk.raw
        convert -n --target-is-zero -O qcow2 disk.raw new.qcow2
        convert --target-is-zero disk.raw out
        convert -n --target-image-opts disk.raw driver=raw,file.filename=zeroes.raw
        convert -n --target-image-opts disk.raw driver=qcow2,file.filename=new.qcow2
        convert -n --target-image-opts disk.raw file.filename=new.qcow2
        convert -n --target-image-opts -O qcow2 disk.raw driver=qcow2,file.filename=new.qcow2
        convert -n --target-image-opts disk.raw driver=raw,size=64k,file.filename=zeroes.raw
        convert -n --target-image-opts disk.raw driver=raw,offset=512k,file.filename=zeroes.raw
        convert -n --target-image-opts short.raw driver=raw,offset=512k,file.filename=zeroes.raw
        convert -n --target-image-opts disk.raw driver=nothing,file.filename=zeroes.raw
        convert -n --target-image-opts disk.raw zeroes.raw
        convert --target-image-opts disk.raw driver=raw,file.filename=zeroes.raw
        convert -n -o size=5 disk.raw zeroes.raw
        convert -n disk.raw disk.raw
        convert disk.raw disk.raw
        convert -f raw -n -O qcow2 new.qcow2 new.qcow2
        convert -U -n disk.raw disk.raw
        convert disk.raw ./disk.raw
    """),
    Row("convert disk.raw linked.raw", given=["ln disk.raw linked.raw"]),
    Row("convert disk.raw linked.raw", given=["ln -s disk.raw linked.raw"]),
    # How images are opened.
    *rows("""
        convert --image-opts driver=raw,file.filename=disk.raw out
        convert --image-opts driver=qcow2,file.filename=disk.qcow2 out
        convert --image-opts driver=qcow2,file.driver=file,file.filename=disk.qcow2 -O qcow2 out
        convert --image-opts -f raw driver=raw,file.filename=disk.raw out
        convert --image-opts disk.raw out
        convert --image-opts driver=raw,offset=64k,size=128k,file.filename=disk.raw out
        convert --image-opts driver=raw,file.filename=disk.raw driver=raw,file.filename=short.raw out
        convert --image-opts driver=raw,what=5,file.filename=disk.raw out
        convert -U disk.raw out
        convert -U --image-opts driver=raw,file.filename=disk.raw,force-share=off out
        convert -t none disk.raw out
        convert -t x disk.raw out
        convert -T none disk.raw out
        convert -T x disk.raw out
        convert -t writethrough -T unsafe disk.raw out
        convert -t directsync -O qcow2 disk.raw out
        convert -t writeback disk.raw out
        convert nowhere out
        convert -f qcow2 disk.raw out
        convert -f nothing disk.raw out
        convert -O nothing disk.raw out
        convert disk.raw nowhere/out
        convert disk.raw .
        convert . out
        convert disk.raw what:ever
        convert what:ever out
        convert disk.raw json:{}
        convert bad-magic.qcow2 out
        convert -f qcow2 bad-magic.qcow2 out
        convert corrupt.qcow2 out
        convert dirty.qcow2 out
        convert cut.qcow2 out
        convert cut-l1.qcow2 out
        convert cut-data.qcow2 out
        convert l2-reserved.qcow2 out
        convert l2-beyond.qcow2 out
        convert -O qcow2 l2-beyond.qcow2 out
        convert --salvage l2-reserved.qcow2 out
        convert --salvage cut-data.qcow2 out
        convert --salvage -q l2-reserved.qcow2 out
    """),
    # The command line.
    *rows("""
        convert
        convert disk.raw
        convert -c
        convert -f
        convert --nothing
        convert -z disk.raw out
        convert -O
        convert -o cluster_size=4k,nothing=5 -O qcow2 disk.raw out
        convert -o nothing=5 disk.raw out
        convert -o cluster_size=4k disk.raw out
        convert -o cluster_size=4 -O qcow2 disk.raw out
        convert -o cluster_size=x -O qcow2 disk.raw out
        convert -o size=5M -O qcow2 disk.raw out
        convert -o ,size=5M -O qcow2 disk.raw out
        convert -o size=5M, -O qcow2 disk.raw out
        convert -o '' -O qcow2 disk.raw out
        convert -o cluster_size=4k -o cluster_size=8k -O qcow2 disk.raw out
        convert -o encryption=on -c -O qcow2 disk.raw out
        convert -o encrypt.format=luks -c -O qcow2 disk.raw out
        convert --skip-broken-bitmaps disk.qcow2 out
        convert --target-is-zero -n
        convert disk.raw out -O qcow2
        convert -- disk.raw out
        convert --obj x disk.raw out
        convert --object throttle-group,id=x disk.raw out
        convert --object nothing,id=x disk.raw out
        convert --force-share disk.raw out
    """),
    # Help about options.
    *rows("""
        convert -o help
        convert -O qcow2 -o help
        convert -O qcow2 -o help disk.raw out
        convert -O raw -o help disk.raw out
        convert -O nothing -o help
        convert -O qcow2 -o cluster_size=4k,help disk.raw out
        convert -o '?' -O qcow2
        convert -n --target-image-opts -o help disk.raw out
    """),
    # Bitmaps.
    *rows("""
        convert --bitmaps -O qcow2 bitmaps.qcow2 out
        convert --bitmaps -O raw bitmaps.qcow2 out
        convert --bitmaps -O qcow2 -o compat=0.10 bitmaps.qcow2 out
        convert --bitmaps -O qcow2 v2.qcow2 out
        convert --bitmaps -O qcow2 disk.raw out
        convert --bitmaps -O qcow2 disk.qcow2 out
        convert --bitmaps -O qcow2 disk.qcow2 disk.qcow2 out
        convert --bitmaps -n -O qcow2 bitmaps.qcow2 new.qcow2
        convert --bitmaps --skip-broken-bitmaps -O qcow2 bitmaps.qcow2 out
        convert --bitmaps -c -O qcow2 bitmaps.qcow2 out
    """),
    # Those of the image, whatever it shows.
    Row(
        "convert --bitmaps -l one -O qcow2 bitmaps.qcow2 out",
        given=["qemu-img snapshot -c one bitmaps.qcow2"],
    ),
    Row(
        "convert --bitmaps -l one -O qcow2 in-use.qcow2 out",
        given=["qemu-img snapshot -c one in-use.qcow2"],
    ),
    Row("convert disk.raw out", held="qemu-io -f raw disk.raw"),
    Row("convert -U disk.raw out", held="qemu-io -f raw disk.raw"),
    Row("convert disk.raw zeroes.raw", held="qemu-io -f raw zeroes.raw", differs=_USED),
    Row("convert -n disk.raw zeroes.raw", held="qemu-io -r -f raw zeroes.raw"),
    Row("convert -O qcow2 disk.raw out", process=True),
    Row("convert -p disk.raw out", process=True),
    Row("convert -T none -t none disk.raw out", on_disk=True),
    Row("convert -T none -t none odd.raw out", on_disk=True),
    Row("convert -T none -t none -O qcow2 odd.raw text.raw disk.qcow2 out", on_disk=True),
    Row("convert -T none -t none -c -O qcow2 disk.qcow2 out", on_disk=True),
    Row("convert -c -n -O qcow2 disk.raw disk.qcow2", differs=_CAN),
    Row("convert -O qcow2 -B out -F qcow2 top.qcow2 out", differs=_OWN),
    Row("convert -n --target-is-zero -B base.qcow2 -O qcow2 disk.raw new.qcow2", differs=_FAILED),
    Row("convert -U disk.raw disk.raw", differs=_OWN),
    Row("convert disk.raw nbd:localhost", differs="no NBD"),
    Row("convert --bitmaps -n -O qcow2 bitmaps.qcow2 terabyte.qcow2"),
    # Option by option, as the manual has them.
    *rows("""
        convert -O raw empty.raw out
        convert -O raw zeroes.raw out
        convert -O raw odd.raw out
        convert -O raw text.raw out
        convert -O raw 'with space.raw' out
        convert -O raw ünïcode.raw out
        convert -O raw new.qcow2 out
        convert -O raw v2.qcow2 out
        convert -O raw disk.qcow2 out
        convert -O raw top.qcow2 out
        convert -O raw over-raw.qcow2 out
        convert -O raw small-clusters.qcow2 out
        convert -O raw subclusters.qcow2 out
        convert -O raw compressed.qcow2 out
        convert -O raw zstd.qcow2 out
        convert -O raw lazy.qcow2 out
        convert -O raw external.qcow2 out
        convert -O raw snapshots.qcow2 out
        convert -O raw bitmaps.qcow2 out
        convert -O raw unlabelled.qcow2 out
        convert -O raw mislabelled.qcow2 out
        convert -O raw orphan.qcow2 out
        convert -O raw bad-magic.qcow2 out
        convert -O raw cut.qcow2 out
        convert -O raw cut-data.qcow2 out
        convert -O raw feature.qcow2 out
        convert -O raw corrupt.qcow2 out
        convert -O raw dirty.qcow2 out
        convert -O raw leak.qcow2 out
        convert -O raw l2-misplaced.qcow2 out
        convert -O raw l2-reserved.qcow2 out
        convert -O raw l2-beyond.qcow2 out
        convert -O raw nowhere out
        convert -O raw . out
        convert -O raw '' out
        convert -O qcow2 text.raw out
        convert -O qcow2 'with space.raw' out
        convert -O qcow2 ünïcode.raw out
        convert -O qcow2 new.qcow2 out
        convert -O qcow2 v2.qcow2 out
        convert -O qcow2 over-raw.qcow2 out
        convert -O qcow2 small-clusters.qcow2 out
        convert -O qcow2 subclusters.qcow2 out
        convert -O qcow2 compressed.qcow2 out
        convert -O qcow2 zstd.qcow2 out
        convert -O qcow2 lazy.qcow2 out
        convert -O qcow2 snapshots.qcow2 out
        convert -O qcow2 unlabelled.qcow2 out
        convert -O qcow2 mislabelled.qcow2 out
        convert -O qcow2 orphan.qcow2 out
        convert -O qcow2 bad-magic.qcow2 out
        convert -O qcow2 cut.qcow2 out
        convert -O qcow2 cut-data.qcow2 out
        convert -O qcow2 feature.qcow2 out
        convert -O qcow2 corrupt.qcow2 out
        convert -O qcow2 dirty.qcow2 out
        convert -O qcow2 leak.qcow2 out
        convert -O qcow2 l2-misplaced.qcow2 out
        convert -O qcow2 l2-reserved.qcow2 out
        convert -O qcow2 nowhere out
        convert -O qcow2 . out
        convert -O qcow2 '' out
        convert disk.qcow2 out
        convert -f raw disk.raw out
        convert -f raw disk.qcow2 out
        convert -O null-co disk.raw out
        convert -O file disk.raw out
        convert -O vmdk disk.raw out -x
        convert -O '' disk.raw out
        convert -f raw -O qcow2 disk.raw short.raw out
        convert -O raw disk.qcow2 disk.raw odd.raw out
        convert -O qcow2 odd.raw odd.raw out
        convert -O raw nowhere disk.raw out
        convert -O raw disk.raw nowhere out
        convert -O raw disk.raw .
        convert -O raw disk.raw nowhere/out
        convert -O qcow2 disk.raw nowhere/out
        convert -O qcow2 disk.raw ''
        convert -q -O qcow2 disk.raw out
        convert -p -O qcow2 zeroes.raw out
        convert -pq -O qcow2 disk.raw out
        convert -c -O qcow2 -o compression_type=zstd disk.raw out
        convert -c -O qcow2 disk.raw disk.raw out
        convert -c -O qcow2 -o extended_l2=on disk.raw out
        convert -c -O qcow2 odd.raw out
        convert -c -O qcow2 -o data_file=data disk.raw out
        convert -C -O raw disk.raw out
        convert -C -S 4k -O raw disk.raw out
        convert -n -O raw disk.raw out
        convert -n -O raw disk.raw zeroes.raw
        convert -n -O raw disk.raw short.raw
        convert -n -O raw disk.raw disk.qcow2
        convert -n -O qcow2 disk.raw disk.qcow2
        convert -n -O qcow2 disk.raw terabyte.qcow2
        convert -n -O qcow2 disk.raw small-clusters.qcow2
        convert -n -O qcow2 -o cluster_size=4k disk.raw new.qcow2
        convert -n -O qcow2 -B base.qcow2 disk.raw new.qcow2
        convert -n -O qcow2 disk.qcow2 top.qcow2
        convert -n --target-is-zero -O raw disk.raw zeroes.raw
        convert --target-is-zero -O raw disk.raw out
        convert -S 0 -O raw disk.raw out
        convert -S 4k -O qcow2 disk.raw out
        convert -S 64k -O raw disk.raw out
        convert -S 1M -O raw disk.raw out
        convert -S 1 -O raw disk.raw out
        convert -S 1000 -O raw disk.raw out
        convert -S -1 -O raw disk.raw out
        convert -S x -O raw disk.raw out
        convert -S 8E -O raw disk.raw out
        convert -m 1 -O qcow2 disk.raw out
        convert -m 16 -O qcow2 disk.raw out
        convert -m 0 -O qcow2 disk.raw out
        convert -m 17 -O qcow2 disk.raw out
        convert -m x -O qcow2 disk.raw out
        convert -m '' -O qcow2 disk.raw out
        convert -W -m 16 -O qcow2 disk.raw out
        convert -W -c -O qcow2 disk.raw out
        convert -W -O raw disk.raw out
        convert -r 1M -O raw disk.raw out
        convert -r x -O raw disk.raw out
        convert -r 0 -O raw disk.raw out
        convert -r -1 -O raw disk.raw out
        convert -o cluster_size=4k -O qcow2 disk.raw out
        convert -o cluster_size=3 -O qcow2 disk.raw out
        convert -o size=2M -O qcow2 disk.raw out
        convert -o size=512k -O qcow2 disk.raw out
        convert -o size=2M -O raw disk.raw out
        convert -o preallocation=full -O raw disk.raw out
        convert -o preallocation=metadata -O qcow2 disk.raw out
        convert -o preallocation=falloc -O qcow2 disk.raw out
        convert -c -o preallocation=metadata -O qcow2 disk.raw out
        convert -o compat=0.10 -O qcow2 disk.qcow2 out
        convert -o compat=0.10 -O qcow2 zeroes.raw out
        convert -o extended_l2=on -O qcow2 disk.raw out
        convert -o data_file=data -O qcow2 disk.raw out
        convert -o data_file=data,data_file_raw=on -O qcow2 disk.raw out
        convert -o lazy_refcounts=on -O qcow2 disk.raw out
        convert -o refcount_bits=1 -O qcow2 disk.raw out
        convert -o nonsense=1 -O qcow2 disk.raw out
        convert -o help -O qcow2
        convert -o help -O raw
        convert -o help -O qcow2 disk.raw out
        convert -o help -O nothing
        convert -o cluster_size=4k -o compat=0.10 -O qcow2 disk.raw out
        convert -B base.qcow2 -O qcow2 top.qcow2 out
        convert -B base.qcow2 -F qcow2 -O qcow2 top.qcow2 out
        convert -B base.qcow2 -F qcow2 -O qcow2 mid.qcow2 out
        convert -B mid.qcow2 -F qcow2 -O qcow2 top.qcow2 out
        convert -B disk.raw -F raw -O qcow2 over-raw.qcow2 out
        convert -B base.qcow2 -F raw -O qcow2 top.qcow2 out
        convert -B base.qcow2 -F nothing -O qcow2 top.qcow2 out
        convert -B nowhere -F qcow2 -O qcow2 top.qcow2 out
        convert -B base.qcow2 -F qcow2 -O raw top.qcow2 out
        convert -B base.qcow2 -F qcow2 -c -O qcow2 top.qcow2 out
        convert -B base.qcow2 -F qcow2 -S 0 -O qcow2 top.qcow2 out
        convert -B short.raw -F raw -O qcow2 disk.raw out
        convert -B large.raw -F raw -O qcow2 disk.raw out
        convert -B base.qcow2 -F qcow2 -O qcow2 top.qcow2 top.qcow2 out
        convert -F qcow2 -O qcow2 top.qcow2 out
        convert -o backing_file=base.qcow2 -O qcow2 top.qcow2 out
        convert -o backing_file=base.qcow2,backing_fmt=qcow2 -O qcow2 top.qcow2 out
        convert -B base.qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 -O qcow2 top.qcow2 out
        convert -o backing_fmt=qcow2 -O qcow2 top.qcow2 out
        convert -l one -O raw snapshots.qcow2 out
        convert -l 1 -O raw snapshots.qcow2 out
        convert -l two -O qcow2 snapshots.qcow2 out
        convert -l snapshot.name=one -O raw snapshots.qcow2 out
        convert -l snapshot.id=2 -O raw snapshots.qcow2 out
        convert -l snapshot.id=2,snapshot.name=two -O raw snapshots.qcow2 out
        convert -l snapshot.id=2,snapshot.name=one -O raw snapshots.qcow2 out
        convert -l snapshot.nonsense=1 -O raw snapshots.qcow2 out
        convert -l three -O raw snapshots.qcow2 out
        convert -l '' -O raw snapshots.qcow2 out
        convert -l one -O raw disk.raw out
        convert -l one -O raw snapshots.qcow2 disk.raw out
        convert -s one -O raw snapshots.qcow2 out
        convert -t none -O raw disk.raw out
        convert -t writeback -O qcow2 disk.raw out
        convert -t writethrough -O qcow2 disk.raw out
        convert -t unsafe -O qcow2 disk.raw out
        convert -t nonsense -O qcow2 disk.raw out
        convert -T writethrough -O qcow2 disk.raw out
        convert -T nonsense -O qcow2 disk.raw out
        convert -U -O raw disk.qcow2 out
        convert --skip-broken-bitmaps -O qcow2 bitmaps.qcow2 out
        convert --bitmaps -O qcow2 bitmaps.qcow2 bitmaps.qcow2 out
        convert --salvage -O raw cut-data.qcow2 out
        convert --salvage -O raw l2-beyond.qcow2 out
        convert --salvage -O raw l2-reserved.qcow2 out
        convert --salvage -q -O raw l2-reserved.qcow2 out
        convert --salvage -C -O raw disk.raw out
        convert --image-opts -O raw driver=qcow2,file.filename=disk.qcow2 out
        convert --image-opts -f qcow2 -O raw driver=qcow2,file.filename=disk.qcow2 out
        convert --image-opts -O raw disk.qcow2 out
        convert --image-opts -O raw driver=null-co,size=1M,read-zeroes=on out
        convert --image-opts -O qcow2 driver=raw,file.filename=disk.raw,offset=64k,size=64k out
        convert --target-image-opts -n disk.raw driver=qcow2,file.filename=new.qcow2
        convert --target-image-opts -n -O qcow2 disk.raw driver=qcow2,file.filename=new.qcow2
        convert --target-image-opts disk.raw driver=qcow2,file.filename=new.qcow2
        convert --target-image-opts -O qcow2 disk.raw driver=qcow2,file.filename=new.qcow2
        convert --target-image-opts -n disk.raw new.qcow2
        convert --target-image-opts -n disk.raw driver=raw,file.filename=zeroes.raw
        convert --target-image-opts -n disk.raw driver=null-co,size=1M
        convert -O raw 'json:{"driver":"qcow2","file":{"driver":"file","filename":"disk.qcow2"}}' out
        convert -n -O qcow2 disk.raw 'json:{"driver":"qcow2","file":{"driver":"file","filename":"new.qcow2"}}'
        convert -O raw file:disk.raw file:out
        convert -O qcow2 disk.raw disk.raw
        convert -O raw disk.qcow2 disk.qcow2
        convert -O qcow2 base.qcow2 top.qcow2
        convert -O qcow2 disk.raw disk.qcow2
        convert -O raw disk.raw short.raw
        convert -O raw large.raw out
        convert -O qcow2 large.raw out
        convert -O qcow2 terabyte.qcow2 out
        convert -e -O qcow2 disk.raw out
        convert -6 -O qcow2 disk.raw out
        convert --object nothing,id=x -O raw disk.raw out
        convert --nonsense disk.raw out
        convert -x disk.raw out
    """),
    *rows(
        """
        convert -O raw disk.raw /dev/null
        """,
        differs="a character device is no image",
    ),
    *rows(
        """
        convert -n --target-is-zero -B base.qcow2 -O qcow2 disk.raw out
        """,
        differs="qemu-img says that it cannot, and succeeds",
    ),
    *rows("""
        convert -O host_device disk.raw out
        convert -O host_device disk.raw zeroes.raw
    """),
    *rows(
        """
        convert -o encryption=on -O qcow2 disk.raw out
        """,
    ),
    Row("convert -O raw disk.qcow2 out", held="qemu-io disk.qcow2"),
    Row("convert -U -O raw disk.qcow2 out", held="qemu-io disk.qcow2"),
    Row("convert -O qcow2 disk.raw disk.qcow2", held="qemu-io disk.qcow2"),
    Row("convert -n -O qcow2 disk.raw disk.qcow2", held="qemu-io disk.qcow2"),
    Row("convert -O raw disk.qcow2 out", held="qemu-io -r disk.qcow2"),
    Row("convert -n -O qcow2 disk.raw disk.qcow2", held="qemu-io -r disk.qcow2"),
    Row("convert -O raw top.qcow2 out", held="qemu-io base.qcow2"),
    Row("convert -p -O raw zeroes.raw out", process=True),
    Row("convert -O qcow2 disk.raw out", on_disk=True),
    Row("convert -t none -T none -O qcow2 disk.raw out", on_disk=True),
    Row("convert -O raw disk.qcow2 out", on_disk=True),
    Row("convert -O raw disk.raw link", given=["ln -s out link", "truncate -s 5M out"]),
)
