# SPDX-License-Identifier: Apache-2.0
"""Reading of the TPU compiler's schedules, on files written here in the form of libtpu's."""

import json

import pytest

from jpaged.pallas_kernels.aot import Loop, read_schedule

UNITS = {"MXU": 4, "VALU": 4, "VSTORE": 1, "SALU": 2}

# 18 bundles with a loop [3, 16) around two, [5, 8) and [10, 13).
BUNDLES = """\
= control target key start
LB: loop body
PF: predicated region fallthrough
= control target key end

     0   :  { %s1 = smov [#allocation2] }
   0x1   :  { %2 = dma.hbm_to_smem /*hbm=*/%s9, /*size_in_granules=*/16, /*smem=*/%s1 }
   0x2   :  {}
   0x3 LB: > { %s3 = sadd.s32 1, %s1  ;;  %s4 = sld [smem:[#allocation3]] } /* Start region 1 */
   0x4   : > { %5 = dma.hbm_to_vmem (!%p1), /*hbm=*/%s3, /*size_in_granules=*/2, /*vmem=*/%s4 /*
base_bounds: (4, 1)
window_bounds: (1, 1) */ }
   0x5 LB: >> { %8 = shalt.err (!%p2) /* BoundsCheck 5 [deref of %s3] for %9 = \
dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s3, /*size_in_granules=*/64, /*vmem=*/%s4
hlo: walk.1
 */ }
   0x6   : >> { %9 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s3, /*size_in_granules=*/64, \
/*vmem=*/%s4  ;;  %v1 = vld [vmem:[%s5]] }
   0x7   :  {}
   0x8 PF: > { %s6 = sld [smem:[#allocation4]] }
   0x9   :  { %s6 = smov %s5 }
   0xa PB LB: >> { %s7 = smov %s6 }
   0xb   : >> { %10 = dma.hbm_to_vmem /*hbm=*/%s7, /*size_in_granules=*/%s8, /*vmem=*/%s4 }
   0xc   : >> { %11 = dma.done.wait %s7, 4096 }
   0xd PF: > { %s2 = smov %s7 }
   0xe PF:  {}
   0xf   : > { %12 = dma.vmem_to_hbm /*vmem=*/%s4, /*size_in_granules=*/1, /*hbm=*/%s3 }
  0x10 PF:  { %s9 = smov %s2 }
  0x11   :  { %13 = dma.vmem_to_hbm /*vmem=*/%s4, /*size_in_granules=*/9, /*hbm=*/%s3 }
"""
LOOPS = [(1, 3, 16), (2, 5, 8), (2, 10, 13)]
NUM_BUNDLES = 18

# SALU works in every bundle, VALU four times in the first inner loop, the others do nothing.
USED = [{"SALU": 1, "VALU": 4 if 5 <= bundle < 8 else 0} for bundle in range(NUM_BUNDLES)]


def slots_text(units=UNITS, used=USED):
    rows = [" ".join(str(row.get(unit, 0)) for unit in units) for row in used]
    names, capacities = ", ".join(units), "    ".join(map(str, units.values()))
    return "\n".join(["== CAPACITY:", names, f"    {capacities}", "== UTILIZATION:", *rows, ""])


def report_text(kernels):
    """The page of vector memory: sizes and tags of each kernel's allocations."""
    breakdowns = {
        kernel: {
            "blocks": [
                {"allocations": [{"size": size, "tag": tag} for size, tag in block]}
                for block in blocks
            ],
            "total_size": sum(size for block in blocks for size, _ in block),
        }
        for kernel, blocks in kernels.items()
    }
    data = json.dumps({"global_info": {}, "hlo_breakdowns": breakdowns})
    return f"<html>\n<script>\n        const DATA = {data};\n</script>\n</html>\n"


@pytest.fixture
def dump(tmp_path):
    """Writes the files of one kernel; its `stamp` is what libtpu's file names begin with."""

    def write(kernel="walk.1", bundles=BUNDLES, slots=None, stamp="17000000000001"):
        name = f"{stamp}-{kernel}"
        (tmp_path / f"{name}-03-final_bundles.txt").write_text(bundles)
        (tmp_path / f"{name}-02-schedule-analysis_final_bundles.txt").write_text("not this one")
        slots_path = tmp_path / f"{name}-01-final_hlo-static-per-bundle-utilization.txt"
        slots_path.write_text(slots_text() if slots is None else slots)
        return tmp_path

    return write


def test_length_and_loops(dump):
    """A loop holds those within it, and ends at a fallthrough; empty bundles show no depth."""
    schedule = read_schedule(dump(), "walk", 32)
    assert schedule.bundles == NUM_BUNDLES
    want = [(depth, end - start) for depth, start, end in LOOPS]
    assert [(loop.depth, loop.bundles) for loop in schedule.loops] == want


@pytest.mark.parametrize("granule", [32, 512])
def test_bytes_of_copies(dump, granule):
    """Of each trip: no bounds check, no copy of a size that is not constant, none outside."""
    outer, first, second = read_schedule(dump(), "walk", granule).loops
    assert first.dma_bytes == 64 * granule
    assert second.dma_bytes == 0
    assert outer.dma_bytes == (2 + 64 + 1) * granule


def test_shares_of_slots(dump):
    outer, first, second = read_schedule(dump(), "walk", 32).loops
    assert first.slots == {"MXU": 0, "VALU": 1, "VSTORE": 0, "SALU": 0.5}
    assert second.slots == {"MXU": 0, "VALU": 0, "VSTORE": 0, "SALU": 0.5}
    assert outer.slots == pytest.approx({"MXU": 0, "VALU": 3 / 13, "VSTORE": 0, "SALU": 0.5})


def test_no_loop(dump):
    text = "     0   :  { %s1 = smov 1 }\n   0x1   :  { %s2 = smov 2 }\n"
    schedule = read_schedule(dump(bundles=text, slots=slots_text(used=USED[:2])), "walk", 32)
    assert (schedule.bundles, schedule.loops) == (2, ())


def test_loops_that_follow_at_once_and_one_that_ends_the_schedule(dump):
    text = "".join(
        f"   {at:#x} {'LB' if starts else '  '}: > {{ %s1 = smov 1 }}\n"
        for at, starts in enumerate([True, False, True, False, False])
    )
    schedule = read_schedule(dump(bundles=text, slots=slots_text(used=USED[:5])), "walk", 32)
    assert [(loop.depth, loop.bundles) for loop in schedule.loops] == [(1, 2), (1, 3)]
    assert isinstance(schedule.loops[0], Loop)


def test_vector_memory_and_spills(dump):
    kernels = {
        "fusion.3": [[(1000, "SPILL")]],
        "walk.1": [[(4096, "scratch operand"), (512, "SPILL")], [(128, "SPILL")]],
    }
    path = dump()
    (path / "17000000000000-TLP-05-vmem_report.html").write_text(report_text(kernels))
    schedule = read_schedule(path, "walk", 32)
    assert (schedule.vmem_bytes, schedule.spill_bytes) == (4096 + 512 + 128, 512 + 128)


def test_vector_memory_that_the_compiler_does_not_report(dump):
    path = dump()
    for text in (None, report_text({"fusion.3": [[(1000, "SPILL")]]})):
        if text:
            (path / "17000000000000-TLP-05-vmem_report.html").write_text(text)
        schedule = read_schedule(path, "walk", 32)
        assert (schedule.vmem_bytes, schedule.spill_bytes) == (None, None)


def test_the_newest_of_several_calls(dump):
    dump("walk.1", stamp="17000000000002", bundles="     0   :  { %s1 = smov 1 }\n")
    path = dump("walk", stamp="17000000000001")
    assert read_schedule(path, "walk", 32).bundles == 1


@pytest.mark.parametrize("missing", ["03-final_bundles", "01-final_hlo-static"])
def test_a_missing_file_is_an_error_that_names_the_kernel(dump, missing):
    path = dump()
    next(path.glob(f"*{missing}*")).unlink()
    with pytest.raises(FileNotFoundError, match="no schedule of 'walk' in "):
        read_schedule(path, "walk", 32)


@pytest.mark.parametrize("kernel", ["walk_far", "wal", "w.lk", "walk.1-03"])
def test_a_kernel_of_another_name_is_none(dump, kernel):
    with pytest.raises(FileNotFoundError, match="no schedule of"):
        read_schedule(dump(), kernel, 32)


def test_units_that_do_not_match_their_capacities_are_an_error(dump):
    slots = slots_text().replace("MXU, VALU", "MXU, XLU, VALU")
    with pytest.raises(ValueError, match=r"utilization\.txt has 5 units and 4 capacities"):
        read_schedule(dump(slots=slots), "walk", 32)


def test_a_kernel_whose_name_ends_alike_is_not_taken_for_it(dump):
    with pytest.raises(FileNotFoundError):
        read_schedule(dump("sleep_walk.1"), "walk", 32)


def test_vector_memory_of_a_kernel_whose_name_is_within_anothers(dump):
    path = dump()
    kernels = {"sleep_walk.1": [[(1000, "SPILL")]], "walk.1": [[(10, "SPILL")]]}
    (path / "17000000000000-TLP-05-vmem_report.html").write_text(report_text(kernels))
    assert read_schedule(path, "walk", 32).spill_bytes == 10


@pytest.mark.parametrize(
    ("bundles", "slots"),
    [("nothing that looks like a bundle\n", slots_text()), (BUNDLES, slots_text(used=USED[:9]))],
    ids=["no bundles", "too few rows"],
)
def test_files_of_another_form_are_an_error(dump, bundles, slots):
    with pytest.raises(ValueError):
        read_schedule(dump(bundles=bundles, slots=slots), "walk", 32)
