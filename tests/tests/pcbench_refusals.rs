//! What pcbench refuses, and how it ends when a server hangs or lies: in bounded time, with one
//! line that says what it was.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use postcopy_e2e::{Scratch, Served, assert_refused, free_port, pcbench, program, stderr, wait_until};
use rustix::process::{Signal, kill_process};

/// The longest that a reader may take to give up, with `--give-up-after 1` and a busy machine.
const BOUND: Duration = Duration::from_secs(20);
/// Exit status of a command line that cannot be followed.
const USAGE: Option<i32> = Some(2);

fn refused(args: &[&str], words: &[&str]) {
    let out = pcbench(args);
    assert_refused(&out, words);
    assert_eq!(out.status.code(), USAGE, "{args:?}: {}", stderr(&out));
    assert!(out.stdout.is_empty(), "{args:?} printed something");
}

#[test]
fn numbers_that_make_no_sense() {
    refused(&["--depth", "0"], &["--depth 0"]);
    refused(&["--depth", "many"], &["--depth", "many"]);
    refused(&["--lanes", "0"], &["--lanes"]);
    refused(&["--rounds", "0"], &["--rounds"]);
    refused(&["--iterations", "0"], &["--iterations 0"]);
    refused(&["--duration", "0"], &["--duration 0"]);
    refused(&["--rate=-1"], &["--rate"]);
    refused(&["--give-up-after", "0"], &["--give-up-after"]);
    refused(&["--cpu", "one"], &["--cpu one", "2,4-6"]);
    refused(&["--cpu", "900"], &["--cpu", "900", "it has"]);
    refused(&["serve", "--memory", "1"], &["--memory", "4K to 1G"]);
    refused(&["serve", "--max-clients", "0"], &["--max-clients 0"]);
    refused(&["compare", "a", "b", "--fail-above", "much"], &["much", "5%"]);
}

#[test]
fn sizes_that_make_no_sense() {
    for (size, word) in
        [("0", "0 bytes"), ("9M", "8M"), ("4K..1K", "backwards"), ("4X", "suffix"), ("4K,4096", "twice")]
    {
        refused(&["--sizes", size], &["--sizes", word]);
    }
    refused(&["--sizes", "4K,64K", "--span", "8K"], &["--span", "64K"]);
    refused(&["--sizes", "8M", "--depth", "1000"], &["to land in", "--depth"]);
}

#[test]
fn huge_pages_that_are_not_reserved() {
    // More than any machine that runs tests has reserved for somebody else.
    let out = pcbench(&["serve", "--listen", "127.0.0.1:0", "--memory", "1G", "--huge-pages"]);
    assert_refused(&out, &["512 huge pages of 2 MiB", "vm.nr_hugepages"]);
}

#[test]
fn options_that_exclude_each_other() {
    refused(&["--iterations", "5", "--duration", "1"], &["--iterations", "--duration"]);
    refused(&["--json", "--format", "csv"], &["--json", "--format"]);
    refused(&["--transport", "tcp", "--device", "rxe0"], &["--device", "verbs"]);
    refused(&["--transport", "tcp,tcp"], &["tcp twice"]);
    refused(&["--queue-pairs", "17"], &["--queue-pairs", "1 to 16"]);
    refused(&["fault", "--memory", "5000"], &["--memory", "5000 bytes"]);
    refused(&["fault", "--transport", "tcp", "--device", "rxe0"], &["--device", "--transport verbs"]);
    refused(&["fault", "--give-up-after", "0"], &["--give-up-after"]);
    refused(&["--transport", "pigeon"], &["pigeon", "shm, tcp or verbs"]);
    refused(&["--no-such-flag"], &["--no-such-flag"]);
    refused(&["--sizes", "64", "doctor"], &["doctor"]);
}

#[test]
fn files_that_cannot_be_written_are_found_before_the_run() {
    let scratch = Scratch::new("unwritable");
    let begin = Instant::now();
    for flag in ["--report", "--plot", "--hgrm", "--hlog"] {
        let path = scratch.file("no/such/folder/file");
        refused(
            &["--transport", "shm", "--duration", "60", flag, path.to_str().unwrap()],
            &["cannot write", "no/such/folder"],
        );
    }
    let path = scratch.file("one");
    let path = path.to_str().unwrap();
    refused(&["--report", path, "--plot", path], &["named for two"]);
    assert!(begin.elapsed() < BOUND, "something was measured first");
}

#[test]
fn a_run_that_fails_leaves_files_as_they_were() {
    let scratch = Scratch::new("kept");
    std::fs::write(scratch.file("old.html"), "old").unwrap();
    let path = |name: &str| scratch.file(name).to_str().unwrap().to_owned();
    let nobody = format!("127.0.0.1:{}", free_port());
    let out = pcbench(&[
        "read",
        &nobody,
        "--transport",
        "tcp",
        "--report",
        &path("old.html"),
        "--plot",
        &path("new.svg"),
    ]);
    assert_refused(&out, &["cannot reach", "pcbench serve"]);
    assert_eq!(out.status.code(), Some(1));
    assert_eq!(std::fs::read_to_string(scratch.file("old.html")).unwrap(), "old");
    assert!(!scratch.file("new.svg").exists());
}

#[test]
fn files_that_are_no_reports() {
    let scratch = Scratch::new("no-report");
    let path = scratch.file("a.json");
    for contents in ["", "hello", "{}", "{\"version\":1}", "{\"version\":2}"] {
        std::fs::write(&path, contents).unwrap();
        refused(&["compare", path.to_str().unwrap(), path.to_str().unwrap()], &["a.json", "no report"]);
    }
    refused(&["compare", "/no/such/file", "/no/such/file"], &["cannot read", "/no/such/file"]);
}

#[test]
fn no_rdma_device_for_pcbench() {
    if std::fs::read_dir("/sys/class/infiniband").is_ok_and(|mut devices| devices.next().is_some()) {
        eprintln!("skipped: this machine has an RDMA device; lab.rs looks for one that does not exist");
        return;
    }
    refused(&["--transport", "verbs"], &["verbs"]);
    refused(&["--device", "mlx5_9"], &["verbs"]);
}

/// A reader over tcp is served.
fn reads_well(served: &Served, more: &[&str]) {
    let out = pcbench(&[&["read", served.address(), "--transport", "tcp"], more].concat());
    assert!(out.status.success(), "{}", stderr(&out));
}

#[test]
fn a_size_beyond_what_the_server_offers() {
    let served = Served::start(&["--memory", "64K"]);
    let out = pcbench(&["read", served.address(), "--transport", "tcp", "--sizes", "4K,1M"]);
    assert_refused(&out, &["a read of 1M", "64K that the peer offers", "serve --memory"]);
    reads_well(&served, &["--sizes", "64K", "--iterations", "10", "--json"]);
}

#[test]
fn more_in_flight_than_a_lane_holds() {
    let out = pcbench(&["--transport", "tcp", "--sizes", "64", "--depth", "4000"]);
    assert_refused(&out, &["a lane holds", "--depth asks for 4000", "--lanes"]);
}

#[test]
fn a_reader_of_another_version() {
    let served = Served::start(&[]);
    let mut stream = TcpStream::connect(served.address()).unwrap();
    stream.write_all(b"{\"read\":{\"version\":1,\"transport\":\"tcp\",\"request\":[]}}\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(
        answer.contains("refused") && answer.contains("version 1") && answer.contains("same release"),
        "{answer}"
    );
}

#[test]
fn strangers_do_not_disturb_a_server() {
    let served = Served::start(&[]);
    let mut silent: Vec<TcpStream> = (0..20).map(|_| TcpStream::connect(served.address()).unwrap()).collect();
    silent[0].write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    silent[1].write_all(&[0xff; 100_000]).ok();
    silent[2].write_all(b"{\"lane\":{\"name\":\"x\",\"index\":0}}\n").unwrap();
    silent[3]
        .write_all(b"{\"read\":{\"version\":4,\"tls\":false,\"transport\":\"tcp\",\"requests\":[],\"mirror\":false}}\n")
        .unwrap();
    silent[4]
        .write_all(
            b"{\"read\":{\"version\":4,\"tls\":false,\"transport\":\"verbs\",\"requests\":[\"zz\"],\"mirror\":true}}\n",
        )
        .unwrap();
    for paging in
        ["{\"memory\":18446744073709551615}", "{\"memory\":0}", "{\"memory\":4097}", "{\"memory\":-1}"]
    {
        let hello = format!(
            "{{\"read\":{{\"version\":4,\"tls\":false,\"transport\":\"tcp\",\"requests\":[\"00\"],\"mirror\":false,\"paging\":{paging}}}}}\n"
        );
        let mut stream = TcpStream::connect(served.address()).unwrap();
        stream.write_all(hello.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("refused"), "{paging}: {answer}");
    }
    reads_well(&served, &["--sizes", "4K", "--iterations", "50", "--verify"]);
}

#[test]
fn more_memory_to_fault_in_than_the_server_offers() {
    let served = Served::start(&["--memory", "1M"]);
    let out = pcbench(&["fault", served.address(), "--memory", "2M", "--rounds", "1"]);
    assert_refused(
        &out,
        &["2M of memory", "1M that the server offers", "--memory", "pcbench serve --memory"],
    );
    let out = pcbench(&["fault", served.address(), "--rounds", "1"]);
    assert_refused(&out, &["64M of memory", "pcbench serve --memory"]);
    let out = pcbench(&["fault", served.address(), "--memory", "1M", "--rounds", "1", "--drain", "on"]);
    assert!(out.status.success(), "{}", stderr(&out));
}

#[test]
fn a_server_that_stands_still_while_memory_is_faulted_in() {
    for signal in [Signal::STOP, Signal::KILL] {
        let served = Served::start(&["--memory", "16M"]);
        let mut command = Command::new(program("pcbench"));
        command.args(["fault", served.address(), "--memory", "16M", "--drain", "off", "--rounds", "100"]);
        command.args(["--give-up-after", "1"]).stdout(Stdio::piped()).stderr(Stdio::piped());
        let faulting = command.spawn().unwrap();
        wait_until("memory is faulted in", || served.log().contains("faults over tcp"));
        std::thread::sleep(Duration::from_millis(20));
        kill_process(served.pid(), signal).unwrap();
        let begin = Instant::now();
        let out = faulting.wait_with_output().unwrap();
        assert!(begin.elapsed() < BOUND, "{signal:?}: {}", stderr(&out));
        // In the middle of the faults, or of the set-up between two cases.
        assert_refused(&out, &["pcbench: "]);
        let said = stderr(&out);
        let why = if signal == Signal::STOP { vec!["1s"] } else { vec!["lane", "reach", "connection"] };
        assert!(why.iter().any(|word| said.contains(word)) && !said.contains("panicked"), "{said}");
    }
}

#[test]
fn a_server_that_has_other_memory_to_fault_in_than_it_says() {
    let fault = |serve: Box<dyn Fn(usize, TcpStream) -> bool + Send>| {
        let address = listening(serve);
        pcbench(&["fault", &address, "--memory", "1M", "--rounds", "1", "--give-up-after", "1"])
    };
    // What a server of an earlier release says to this one's version.
    let old = "{\"refused\":\"it speaks version 3 of pcbench's protocol, this side 2; use the same release on both sides\"}\n";
    let out = fault(Box::new(says(old.as_bytes())));
    assert_refused(&out, &["refused", "version 3", "this side 2", "same release"]);
    let out = fault(Box::new(says(b"{\"granted\":{\"region\":\"00\",\"grants\":[],\"name\":\"\",\"mirror_requests\":[],\"machine\":{}}}\n")));
    assert_refused(&out, &["granted another number of lanes"]);
    let out = fault(Box::new(says(b"")));
    assert_refused(&out, &["no answer within 1s"]);
}

/// A server that does `serve` with each connection, in turn, until `true` ends it; says where it is.
fn listening(serve: impl Fn(usize, TcpStream) -> bool + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for (index, stream) in listener.incoming().enumerate() {
            if serve(index, stream.unwrap()) {
                return;
            }
        }
    });
    address
}

/// Reads from a server that does `serve` with each connection, in turn; `true` ends it.
fn read_from(serve: impl Fn(usize, TcpStream) -> bool + Send + 'static) -> (Output, Duration) {
    let address = listening(serve);
    let begin = Instant::now();
    let args =
        ["--transport", "tcp", "--sizes", "64", "--iterations", "100", "--give-up-after", "1", "--verify"];
    let out = pcbench(&[&["read", &address], &args[..]].concat());
    (out, begin.elapsed())
}

fn gives_up(words: &[&str], serve: impl Fn(usize, TcpStream) -> bool + Send + 'static) {
    let (out, took) = read_from(serve);
    assert_eq!(out.status.code(), Some(1), "{}", stderr(&out));
    let said = stderr(&out);
    assert!(took < BOUND, "{took:?}: {said}");
    let last = said.lines().last().unwrap_or_default();
    words.iter().for_each(|word| assert!(last.contains(word), "`{word}` is not in: {said}"));
    assert!(!said.contains('\x1b') && !said.contains("panicked"), "{said}");
}

/// Says a line, whatever was asked, and keeps the connection.
fn says(line: &'static [u8]) -> impl Fn(usize, TcpStream) -> bool + Send + 'static {
    move |_, mut stream| {
        let _ = stream.write_all(line);
        std::thread::sleep(BOUND);
        true
    }
}

#[test]
fn transports_that_nobody_asked_for_are_left_out_where_the_server_has_none() {
    // It refuses the first, shm, and then hangs: so the reader went on to the next.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        let (mut first, _) = listener.accept().unwrap();
        first.write_all(b"{\"refused\":\"no such thing here\"}\n").unwrap();
        let _second = listener.accept();
        std::thread::sleep(BOUND);
    });
    let out = pcbench(&["read", &address, "--give-up-after", "1"]);
    assert_refused(&out, &["setting up tcp", "no answer within 1s"]);
}

#[test]
fn a_server_that_says_nothing() {
    gives_up(&["no answer within 1s"], says(b""));
}

#[test]
fn a_server_that_says_a_byte_now_and_then() {
    gives_up(&["no answer within 1s"], |_, mut stream| {
        while stream.write_all(b" ").is_ok() {
            std::thread::sleep(Duration::from_millis(200));
        }
        true
    });
}

#[test]
fn a_server_that_speaks_another_language() {
    gives_up(&["another language", "HTTP/1.1 400"], says(b"HTTP/1.1 400 Bad Request\r\n\r\n"));
    gives_up(&["no text"], says(b"\xff\xfe\n"));
    gives_up(&["another language"], says(b"{\"granted\":{\"region\":5}}\n"));
    gives_up(&["not ready, or speaks", "release"].map(|_| "release"), says(b"\"ready\"\n"));
}

#[test]
fn a_server_whose_words_would_command_the_terminal() {
    gives_up(&["refused", "[2J"], says(b"{\"refused\":\"\\u001b[2J\\u001b]0;owned\\u0007\"}\n"));
}

#[test]
fn a_server_that_never_ends_its_line() {
    gives_up(&["without end"], |_, mut stream| {
        while stream.write_all(&[b'x'; 4096]).is_ok() {}
        true
    });
}

/// A server that opens one lane as it should, and then does `serve` with it.
fn with_a_lane(
    region: [u64; 3],
    serve: impl Fn(TcpStream) + Send + 'static,
) -> impl Fn(usize, TcpStream) -> bool + Send {
    let control = std::sync::Mutex::new(None::<TcpStream>);
    let hex: String =
        region.iter().flat_map(|word| word.to_le_bytes()).map(|byte| format!("{byte:02x}")).collect();
    move |index, mut stream| {
        let mut line = String::new();
        BufReader::with_capacity(1, &stream).read_line(&mut line).unwrap();
        if index == 0 {
            let granted = format!(
                "{{\"granted\":{{\"region\":\"{hex}\",\"grants\":[\"0100010000\"],\"name\":\"x\",\"mirror_requests\":[],\"machine\":{{}}}}}}\n"
            );
            stream.write_all(granted.as_bytes()).unwrap();
            *control.lock().unwrap() = Some(stream);
            return false;
        }
        control.lock().unwrap().as_mut().unwrap().write_all(b"\"ready\"\n").unwrap();
        serve(stream);
        true
    }
}

const REGION: [u64; 3] = [0, 1 << 20, 7];

#[test]
fn a_server_that_hangs_in_the_middle_of_the_reads() {
    gives_up(&["tcp", "nothing has arrived for 1s"], with_a_lane(REGION, |_| std::thread::sleep(BOUND)));
}

#[test]
fn a_server_that_closes_a_lane() {
    gives_up(&["tcp", "lost its lane"], with_a_lane(REGION, drop));
}

#[test]
fn a_server_that_answers_nonsense() {
    gives_up(
        &["tcp", "broke the lane protocol"],
        with_a_lane(REGION, |mut stream| {
            let _ = stream.write_all(&[0xa5; 4096]);
            std::thread::sleep(BOUND);
        }),
    );
}

#[test]
fn a_server_that_sends_other_bytes_than_it_has() {
    // A request is 32 bytes; the answer echoes its tag and length, and its payload is all ones.
    gives_up(
        &["bad data", "not what the peer has"],
        with_a_lane(REGION, |mut stream| {
            let mut request = [0u8; 32];
            while stream.read_exact(&mut request).is_ok() {
                let answer = [&request[8..16], &[0; 4], &64u32.to_le_bytes(), &[0xff; 64]].concat();
                let _ = stream.write_all(&answer);
            }
        }),
    );
}

#[test]
fn a_server_whose_memory_is_none() {
    gives_up(&["offers nothing"], with_a_lane([0, 0, 7], |_| std::thread::sleep(BOUND)));
}

#[test]
fn a_server_that_opens_memory_at_the_end_of_the_address_space() {
    gives_up(&["read"], with_a_lane([u64::MAX - 100, u64::MAX, 7], |_| std::thread::sleep(BOUND)));
}
