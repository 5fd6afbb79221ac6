//! Migrations under TLS: which hosts give a guest to each other, and what somebody on the way hears of it and can do to it. The
//! tiny guest, on this host's KVM, verifies every word that it reads.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::path::Path;
use std::process::Command;

use postcopy_e2e::authority::Authority;
use postcopy_e2e::reports::assert_whole;
use postcopy_e2e::tap::Tap;
use postcopy_e2e::{
    Pcvm, Scratch, assert_refused, free_port, free_ports, program, receive_args, run, stderr, variable,
};
use postcopy_engine::session::SourceTls;

/// The address that hosts of these tests have, and so the name in their certificates.
const HERE: &str = "127.0.0.1";
/// Pages of the guest.
const PAGES: u64 = 2048;

fn receive(scratch: &Scratch, name: &str, port: u16, folder: &Path) -> Pcvm {
    Pcvm::receive(scratch, name, port, &tls(folder))
}

fn tls(folder: &Path) -> [&str; 2] {
    ["--tls", folder.to_str().unwrap()]
}

fn refused(source: &Pcvm, port: u16, more: &[&str], words: &[&str]) {
    let out = source.try_migrate(&format!("{HERE}:{port}"), &[&["--transport", "tcp"][..], more].concat());
    assert_refused(&out, &[&["the guest runs on here"], words].concat());
    source.wait_for_progress();
}

#[test]
fn a_guest_moves_and_moves_on() {
    let (scratch, authority) = (Scratch::new("tls-moves"), Authority::default());
    let [here, elsewhere] = [HERE, "elsewhere.example"].map(|host| authority.folder(&scratch, host, host));
    let ports = free_ports::<2>();
    let first = Pcvm::run_tiny(&scratch, "a");
    let second = receive(&scratch, "b", ports[0], &here);
    let to = format!("{HERE}:{}", ports[0]);
    let report = first.migrate(&to, &[&["--transport", "tcp"][..], &tls(&here)].concat());
    assert_whole(&report, PAGES);
    second.assert_runs();
    // By name, and from a folder that is named relative to where the command runs.
    let third = receive(&scratch, "c", ports[1], &elsewhere);
    let how = ["--json", "--transport", "shm", "--mode", "hybrid"];
    let named = ["--tls", "elsewhere.example", "--tls-hostname", "elsewhere.example"];
    let mut command = second.migration(&format!("{HERE}:{}", ports[1]), &[&how[..], &named].concat());
    let out = run(command.current_dir(scratch.file("")));
    assert!(out.status.success(), "{}", stderr(&out));
    assert_whole(&serde_json::from_slice(&out.stdout).unwrap(), PAGES);
    third.assert_runs();
}

#[test]
fn it_goes_to_nobody_else_and_comes_from_nobody_else() {
    let (scratch, port) = (Scratch::new("tls-strangers"), free_port());
    let (authority, other) = (Authority::default(), Authority::default());
    let good = authority.folder(&scratch, "good", HERE);
    let strange = other.folder(&scratch, "strange", HERE);
    // One that trusts the right authority, and that the authority has not signed.
    let unsigned = authority.folder(&scratch, "unsigned", HERE);
    other.sign(&unsigned, "client", HERE);

    let source = Pcvm::run_tiny(&scratch, "a");
    let destination = receive(&scratch, "b", port, &good);
    refused(&source, port, &[], &["the peer is set up for TLS, and this side is not", "--tls"]);
    let stranger = ["not who it has to be, or does not take this side for it", "docs/tls.md"];
    refused(&source, port, &tls(&strange), &[&stranger[..], &["invalid peer certificate"]].concat());
    refused(&source, port, &tls(&unsigned), &stranger);
    let misnamed = [&tls(&good)[..], &["--tls-hostname", "elsewhere.example"]].concat();
    refused(&source, port, &misnamed, &[&stranger[..], &["not valid for name"]].concat());

    let plain = free_port();
    let careless = Pcvm::receive(&scratch, "c", plain, &[]);
    let one_sided = ["this side is set up for TLS, and the peer is not", "--tls"];
    refused(&source, plain, &tls(&good), &one_sided);
    drop(careless);

    // All of them have left the destination as it was.
    let report =
        source.migrate(&format!("{HERE}:{port}"), &[&["--transport", "tcp"][..], &tls(&good)].concat());
    assert_whole(&report, PAGES);
    destination.assert_runs();
}

/// Moves the tiny guest from one new process to another, by way of a tap.
fn moved_by_way_of_a_tap(
    name: &str,
    (receives, migrates): (&[&str], &[&str]),
    prepare: impl FnOnce(&Tap),
) -> (Tap, serde_json::Value) {
    let (scratch, port) = (Scratch::new(name), free_port());
    let source = Pcvm::run_tiny(&scratch, "a");
    let destination = Pcvm::receive(&scratch, "b", port, receives);
    let tap = Tap::to(([127, 0, 0, 1], port));
    prepare(&tap);
    let report = source.migrate(&tap.address().to_string(), migrates);
    assert_whole(&report, PAGES);
    destination.assert_runs();
    (tap, report)
}

/// Bytes of the tiny guest's memory that no move changes: the end of its program.
fn some_memory() -> Vec<u8> {
    let file = postcopy_guest::tiny::tiny_elf();
    file[file.len() - 64..].to_vec()
}

/// With one thread and with several, in place, and in hybrid.
const WAYS: [(&[&str], &[&str]); 4] = [
    (&["--self-service", "off"], &[]),
    (&["--shards", "2", "--connections", "2"], &[]),
    (&["--landing", "in-place"], &[]),
    (&[], &["--mode", "hybrid"]),
];

#[test]
fn nobody_on_the_way_hears_a_page() {
    let scratch = Scratch::new("tls-tap");
    let folder = Authority::default().folder(&scratch, "certificates", HERE);
    for (receives, migrates) in WAYS {
        // It is said on no side that it has to be tcp: nothing else is taken then.
        let (receives, migrates) = ([receives, &tls(&folder)].concat(), [migrates, &tls(&folder)].concat());
        let (tap, report) = moved_by_way_of_a_tap("tls-heard", (&receives, &migrates), |_| {});
        assert_eq!((&report["transport"], &report["pages_encrypted"]), (&"tcp".into(), &true.into()));
        assert!(!tap.has_heard(&some_memory()), "{receives:?}");
    }
    let (tap, report) = moved_by_way_of_a_tap("tls-in-clear", (&[], &["--transport", "tcp"]), |_| {});
    assert_eq!(report["pages_encrypted"], false);
    assert!(tap.has_heard(&some_memory()), "it hears what is in clear");
}

#[test]
#[ignore = "needs an RDMA device at LAB_RDMA_ADDR: run by scripts/test in the lab"]
fn pages_cross_over_verbs_where_both_sides_say_so_and_not_else() {
    let address = variable("LAB_RDMA_ADDR");
    let (scratch, ports) = (Scratch::new("tls-verbs"), free_ports::<3>());
    let folder = Authority::default().folder(&scratch, "certificates", &address);
    let receiver = |name: &str, port: u16, how: &[&str]| {
        let listen = ["receive", "--listen", &format!("{address}:{port}")];
        Pcvm::start(&scratch, name, &[&listen[..], &tls(&folder), how].concat())
    };
    let (verbs, source) = (["--transport", "verbs"], Pcvm::run_tiny(&scratch, "a"));
    let unasked = receiver("b", ports[0], &[]);
    let out = source.try_migrate(&format!("{address}:{}", ports[0]), &[&verbs[..], &tls(&folder)].concat());
    let words = ["no transport of those offered (verbs)", "pages cross in clear", "the guest runs on here"];
    assert_refused(&out, &words);
    drop(unasked);
    let said = [
        (receiver("c", ports[1], &[]), ports[1], &[][..], "tcp"),
        (receiver("d", ports[2], &verbs), ports[2], &verbs, "verbs"),
    ];
    let mut here = source;
    for (there, port, how, transport) in said {
        let report = here.migrate(&format!("{address}:{port}"), &[how, &tls(&folder)].concat());
        assert_whole(&report, PAGES);
        assert_eq!(report["transport"], transport);
        assert_eq!(report["pages_encrypted"], transport == "tcp");
        there.assert_runs();
        here = there;
    }
}

#[test]
fn a_lane_that_does_not_show_its_sources_certificate_is_not_taken_for_one() {
    let (scratch, authority) = (Scratch::new("tls-pretender"), Authority::default());
    let [folder, another] = ["source", "another"].map(|host| authority.folder(&scratch, host, HERE));
    let how = (&tls(&folder)[..], &tls(&folder)[..]);
    // Of the same authority, so that the destination would take a guest from it.
    let another = SourceTls::read(&another, None).unwrap();
    for by in [None, Some(another)] {
        let (tap, _) = moved_by_way_of_a_tap("tls-pretended", how, |tap| tap.pretend(by));
        assert!(tap.pretended() > 1, "before the urgent lane, and before that for bulk");
    }
}

#[test]
fn a_page_that_was_changed_on_the_way_ends_its_lane_and_comes_again() {
    let scratch = Scratch::new("tls-changed");
    let folder = Authority::default().folder(&scratch, "certificates", HERE);
    // In hybrid it is in the round, while the guest runs at its source.
    let (hybrid, ways) = WAYS.split_last().unwrap();
    for (receives, migrates) in ways {
        let (receives, migrates) =
            ([*receives, &tls(&folder)].concat(), [*migrates, &tls(&folder), &["--patience", "30"]].concat());
        let (tap, report) =
            moved_by_way_of_a_tap("tls-spoilt", (&receives, &migrates), |tap| tap.change_after(3 << 20));
        assert!(tap.has_changed(), "{report}");
    }
    let port = free_port();
    let source = Pcvm::run_tiny(&scratch, "a");
    let _destination = receive(&scratch, "b", port, &folder);
    let tap = Tap::to(([127, 0, 0, 1], port));
    tap.change_after(3 << 20);
    let out = source.try_migrate(&tap.address().to_string(), &[hybrid.1, &tls(&folder)].concat());
    assert_refused(&out, &["the guest runs on here", "decrypt"]);
    source.wait_for_progress();
}

/// Runs the documentation's commands of that number.
fn run_documented(scratch: &Scratch, number: usize) {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/tls.md")).unwrap();
    let script = page.split("```sh\n").nth(number).unwrap().split("```").next().unwrap();
    let script = script.replace("192.0.2.7", HERE);
    let mut shell = Command::new("bash");
    let out = run(shell.args(["-euc", &script]).current_dir(scratch.file("")));
    assert!(out.status.success(), "{}", stderr(&out));
}

#[test]
fn the_folder_that_the_documentation_makes_is_good_until_it_is_taken_back() {
    let (scratch, port) = (Scratch::new("tls-documentation"), free_port());
    run_documented(&scratch, 1);
    let host = scratch.file("host");
    let source = Pcvm::run_tiny(&scratch, "a");
    let destination = receive(&scratch, "b", port, &host);

    // What it is taken back as: with the list beside the same certificates, each side knows of the other.
    let informed = scratch.file("informed");
    let mut copy = Command::new("cp");
    assert!(run(copy.arg("-r").args([&host, &informed])).status.success());
    run_documented(&scratch, 2);
    std::fs::copy(scratch.file("ca-crl.pem"), informed.join("ca-crl.pem")).unwrap();
    refused(&source, port, &tls(&informed), &["not who it has to be", "Revoked"]);
    let aware = free_port();
    let cautious = receive(&scratch, "c", aware, &informed);
    refused(&source, aware, &tls(&host), &["does not take this side for it", "Revoked"]);
    drop(cautious);

    // Nobody has told these two.
    let how = [&["--transport", "tcp"][..], &tls(&host)].concat();
    assert_whole(&source.migrate(&format!("{HERE}:{port}"), &how), PAGES);
    destination.assert_runs();
}

#[test]
fn nobody_is_trusted_on_a_list_that_is_out_of_date() {
    let (scratch, port, authority) = (Scratch::new("tls-stale"), free_port(), Authority::default());
    let [good, stale] = ["good", "stale"].map(|name| authority.folder(&scratch, name, HERE));
    authority.stale_list(&stale);
    let source = Pcvm::run_tiny(&scratch, "a");
    let _destination = receive(&scratch, "b", port, &good);
    refused(&source, port, &tls(&stale), &["not who it has to be", "revocation list expired"]);
}

#[test]
fn certificates_that_cannot_be_used_are_refused_by_the_file() {
    let (scratch, authority) = (Scratch::new("tls-folders"), Authority::default());
    let refused = |folder: &Path, words: &[&str]| {
        let mut command = Command::new(program("pcvm"));
        command.args(receive_args(&scratch, &format!("{HERE}:0"))).args(tls(folder));
        assert_refused(&run(&mut command), words);
    };
    refused(&scratch.file("nowhere"), &["nowhere/ca-cert.pem: ", "No such file"]);
    let folder = authority.folder(&scratch, "folder", HERE);
    std::fs::copy(folder.join("client-key.pem"), folder.join("server-key.pem")).unwrap();
    refused(&folder, &["folder: ", "key"]);
    std::fs::copy(folder.join("server-cert.pem"), folder.join("server-key.pem")).unwrap();
    refused(&folder, &["server-key.pem: it has no private key in PEM"]);
    std::fs::write(folder.join("server-cert.pem"), "no certificate").unwrap();
    refused(&folder, &["server-cert.pem: it has no certificate in PEM"]);
    std::fs::write(
        folder.join("ca-cert.pem"),
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    )
    .unwrap();
    refused(&folder, &["ca-cert.pem: "]);
    let listed = authority.folder(&scratch, "listed", HERE);
    let list = |said: &str| std::fs::write(listed.join("ca-crl.pem"), said).unwrap();
    list("no list");
    refused(&listed, &["ca-crl.pem: it has no list of certificates that were taken back"]);
    list("-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n");
    refused(&listed, &["ca-crl.pem: "]);
    let source = Pcvm::run_tiny(&scratch, "a");
    let out = source.try_migrate(&format!("{HERE}:1"), &tls(&scratch.file("nowhere")));
    assert_refused(&out, &["nowhere/ca-cert.pem: "]);
    source.wait_for_progress();
}
