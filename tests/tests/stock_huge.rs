//! Guests of a stock QEMU whose RAM is of huge pages (hugetlbfs) where they leave from. `stock.rs` says what ignored tests need;
//! these reserve huge pages for as long as they run, and do nothing where the system has none to give.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::net::IpAddr;

use postcopy_e2e::qemu::{HugePages, LOOPBACK, Plain, address};
use postcopy_e2e::system::kernel_is_since;
use postcopy_e2e::{Scratch, assert_refused};

/// Moves a guest that has them, and looks at it when the destination has put its pages together.
fn leaves(transport: &str, address: IpAddr, [page, mib]: [u64; 2], mode: &str) {
    let scratch = Scratch::new(&format!("stock-huge-{transport}-{page}-{mode}"));
    let Some(pages) = HugePages::reserve(&scratch, page, mib) else { return };
    let machine = Plain { mib, ..Plain::linux("pcguest.mb=64 pcguest.access=write pcguest.pace_us=100") };
    let source = machine.within(pages.folder()).start_preloaded(&scratch, "q0");
    source.wait_for_reports(2);
    let (next, to) = machine.receive(&scratch, "q1", address, &["--shards", "2"]);
    if mode == "hybrid" && !kernel_is_since(6, 7) {
        let words = ["no soft-dirty bits", "--mode postcopy", "the guest runs on here"];
        assert_refused(&source.try_migrate_by(to, transport, mode), &words);
        source.wait_for_reports(1);
        source.verify();
        return;
    }
    let report = source.migrate_by(&next, to, transport, mode);
    let kept = report["pager"]["pages"]["kept_pages"].as_u64().unwrap();
    assert_eq!(kept > 0, mode == "hybrid", "{report}");
    next.wait_for_reports(2);
    next.verify();
    // Debian 12's refuses to (EINVAL): its memory stays in small pages.
    if !kernel_is_since(6, 7) {
        return;
    }
    let put_together = || next.status_of_pcvm()["arrival"]["huge_pages"]["bytes"].as_u64() > Some(0);
    next.wait_until("some of its pages are huge again", put_together);
}

#[test]
#[ignore = "needs a Linux kernel: run by scripts/test"]
fn a_guest_leaves_huge_pages_for_small_ones_and_has_transparent_ones_there() {
    leaves("tcp", LOOPBACK, [2, 256], "postcopy");
    leaves("tcp", LOOPBACK, [1024, 1024], "postcopy");
}

#[test]
#[ignore = "needs RDMA and a Linux kernel: run by scripts/test"]
fn a_guest_leaves_huge_pages_over_verbs() {
    leaves("verbs", address(), [2, 256], "postcopy");
}

/// What the guest writes to huge pages is seen by write protection (Linux 6.7), which the library brings, or not at all.
#[test]
#[ignore = "needs a Linux kernel: run by scripts/test"]
fn a_guest_leaves_huge_pages_in_hybrid_where_its_writes_are_seen() {
    leaves("tcp", LOOPBACK, [2, 256], "hybrid");
}

#[test]
fn a_destination_of_huge_pages_is_refused() {
    let scratch = Scratch::new("stock-huge-there");
    let Some(pages) = HugePages::reserve(&scratch, 2, 256) else { return };
    let out = Plain::firmware().within(pages.folder()).receive_to_the_end(&scratch, "q1");
    assert_refused(&out, &["this guest cannot be moved", "not on a disk or of huge pages"]);
}
