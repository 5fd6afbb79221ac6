//! Every transport that this machine has, through the public seam: the same promises for each.
//!
//! Verbs takes part wherever there is an RDMA device (in the lab there is one).

#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

mod pairs;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use pairs::{stream_pair, tls_pair, tls_pair_and_socket};
use postcopy_transport::{
    AnyLane, Completion, EndpointOptions, Exporter, HostMemory, Importer, Lane, LaneClass, LaneError, Read,
    ReadError, RemoteRegion, SetupError, Token, Transport,
};

const MEMORY: usize = 4 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

/// Two ends on one host, with one lane.
struct Pair {
    exporter: Exporter,
    source: HostMemory,
    landing: HostMemory,
    importer: Importer,
    lane: AnyLane,
}

fn available() -> Vec<Transport> {
    let known = Transport::ALL.into_iter();
    known
        .filter(|transport| match transport.available() {
            Ok(()) => true,
            Err(error) => {
                println!("not on this machine: {error}");
                false
            }
        })
        .collect()
}

/// Bytes that differ by position, over all of memory.
fn filled(len: usize) -> (HostMemory, Vec<u8>) {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    let memory = HostMemory::anonymous("test", len).unwrap();
    assert!(memory.write(0, &bytes));
    (memory, bytes)
}

/// A way to make a lane.
#[derive(Clone, Debug)]
struct Variant {
    transport: Transport,
    tls: bool,
    class: LaneClass,
    options: EndpointOptions,
}

fn pair(transport: Transport) -> (Pair, Vec<u8>) {
    pair_by(&Variant { transport, tls: false, class: LaneClass::Urgent, options: EndpointOptions::default() })
}

fn pair_by(Variant { transport, tls, class, options }: &Variant) -> (Pair, Vec<u8>) {
    let (source, bytes) = filled(MEMORY);
    let landing = HostMemory::anonymous("landing", MEMORY).unwrap();
    let mut exporter = Exporter::new(*transport, std::slice::from_ref(&source), options).unwrap();
    let importer = Importer::new(*transport, std::slice::from_ref(&landing), options).unwrap();
    let lane = match tls {
        false => importer.connect_local(&mut exporter, *class).unwrap(),
        true => lane_under_tls(&importer, &mut exporter, *class),
    };
    (Pair { exporter, source, landing, importer, lane }, bytes)
}

fn lane_under_tls(importer: &Importer, exporter: &mut Exporter, class: LaneClass) -> AnyLane {
    let (request, blob) = importer.request(class).unwrap();
    let grant = exporter.grant(&blob).unwrap();
    let mut streams = Vec::new();
    for _ in 0..request.streams() {
        let (served, reads) = tls_pair();
        exporter.attach(served).unwrap();
        streams.push(reads);
    }
    importer.connect(request, &grant, streams).unwrap()
}

/// Lanes of every class, of one path and of several, in clear and under TLS, and (with two devices named in
/// `POSTCOPY_RAILS`) of several rails.
fn variants() -> Vec<Variant> {
    let rails = std::env::var("POSTCOPY_RAILS").unwrap_or_default();
    let rails: Vec<String> = rails.split(',').filter(|name| !name.is_empty()).map(Into::into).collect();
    let mut variants = Vec::new();
    for transport in available() {
        for class in [LaneClass::Urgent, LaneClass::Bulk] {
            for paths in [1, 3] {
                let options = EndpointOptions { paths: Some(paths), ..Default::default() };
                let variant = Variant { transport, tls: false, class, options };
                if transport == Transport::Tcp {
                    variants.push(Variant { tls: true, ..variant.clone() });
                }
                variants.push(variant);
            }
        }
        if transport == Transport::Verbs && !rails.is_empty() {
            let options = EndpointOptions { devices: rails.clone(), ..Default::default() };
            variants.push(Variant { transport, tls: false, class: LaneClass::Bulk, options });
        }
    }
    variants
}

impl Pair {
    fn read(&self, token: u64, from: u64, to: u64, len: u32) -> Read {
        self.read_by(self.exporter.regions()[0], token, from, to, len)
    }

    fn read_by(&self, region: RemoteRegion, token: u64, from: u64, to: u64, len: u32) -> Read {
        let local = self.importer.regions()[0].slice(to, len).unwrap();
        Read::new(Token(token), local, region.slice(from, len).unwrap()).unwrap()
    }
}

/// Waits for `count` completions.
fn collect(lane: &mut AnyLane, count: usize) -> Result<Vec<Completion>, LaneError> {
    let begin = Instant::now();
    let mut done = Vec::new();
    while done.len() < count {
        assert!(begin.elapsed() < PATIENCE, "{} of {count} completions", done.len());
        lane.poll(&mut done)?;
    }
    Ok(done)
}

#[test]
fn every_byte_arrives_in_its_place_at_any_size_and_order() {
    for variant in variants() {
        let (mut pair, bytes) = pair_by(&variant);
        let sizes = [1u32, 8, 63, 4096, 4096 + 17, 65536, 1 << 20];
        let mut target = 0u64;
        let mut expected = vec![0u8; MEMORY];
        let mut reads = Vec::new();
        for (index, size) in sizes.iter().cycle().take(21).enumerate() {
            let from = (index as u64 * 123_457) % (MEMORY as u64 - u64::from(*size));
            if target + u64::from(*size) > MEMORY as u64 {
                break;
            }
            reads.push(pair.read(index as u64, from, target, *size));
            let (from, to, len) = (from as usize, target as usize, *size as usize);
            expected[to..to + len].copy_from_slice(&bytes[from..from + len]);
            target += u64::from(*size) + 11;
        }
        assert_eq!(pair.lane.post(&reads).unwrap(), reads.len(), "{variant:?}");
        let mut tokens: Vec<u64> = collect(&mut pair.lane, reads.len())
            .unwrap()
            .into_iter()
            .map(|completion| {
                completion.result.unwrap();
                completion.token.0
            })
            .collect();
        tokens.sort_unstable();
        assert_eq!(tokens, (0..reads.len() as u64).collect::<Vec<_>>(), "{variant:?}");
        let mut landed = vec![0u8; MEMORY];
        assert!(pair.landing.read(0, &mut landed));
        assert!(landed == expected, "{variant:?}: bytes outside or inside the targets differ");
    }
}

#[test]
fn a_lane_takes_as_many_reads_as_it_has_room_for() {
    for variant in variants() {
        let (mut pair, _) = pair_by(&variant);
        let reads: Vec<Read> = (0..500).map(|i| pair.read(i, i * 4096, i * 4096, 4096)).collect();
        let room = pair.lane.room();
        assert!(room > 0 && room < 500, "{variant:?}: {room}");
        let accepted = pair.lane.post(&reads).unwrap();
        assert_eq!(accepted, room, "{variant:?}");
        assert_eq!(pair.lane.post(&reads[accepted..]).unwrap(), pair.lane.room().min(500 - accepted));
        let done = collect(&mut pair.lane, accepted).unwrap();
        assert!(done.len() >= accepted, "{variant:?}");
    }
}

#[test]
fn an_armed_lane_wakes_its_sleeper() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    for variant in variants() {
        if variant.transport == Transport::Shm {
            continue;
        }
        let (mut pair, _) = pair_by(&variant);
        let mut done = Vec::new();
        for round in 0..200 {
            let read = pair.read(round, round * 4096, 0, 4096);
            assert_eq!(pair.lane.post(&[read]).unwrap(), 1);
            while done.is_empty() {
                if pair.lane.arm().unwrap() {
                    let mut waited = [PollFd::from_borrowed_fd(pair.lane.descriptor(), PollFlags::IN)];
                    let timeout = Timespec { tv_sec: 20, tv_nsec: 0 };
                    let ready = poll(&mut waited, Some(&timeout)).unwrap();
                    assert_eq!(ready, 1, "{variant:?}: slept through a completion in round {round}");
                }
                pair.lane.poll(&mut done).unwrap();
            }
            assert_eq!(done.pop().unwrap().token, Token(round));
        }
    }
}

#[test]
fn a_wrong_key_fails_the_read_and_other_lanes_go_on() {
    for transport in available() {
        let (mut pair, _) = pair(transport);
        let mut other = pair.importer.connect_local(&mut pair.exporter, LaneClass::Urgent).unwrap();
        let (stranger, _) = filled(MEMORY);
        let strange =
            Exporter::new(transport, &[stranger.clone(), stranger], &EndpointOptions::default()).unwrap();
        let wrong = strange.regions()[1];
        let read = pair.read_by(wrong, 1, 0, 0, 4096);
        pair.lane.post(&[read]).unwrap();
        match collect(&mut pair.lane, 1) {
            Ok(done) => assert_eq!(done[0].result, Err(ReadError::Refused), "{transport}"),
            Err(error) => assert!(error.to_string().contains("remote access"), "{transport}: {error}"),
        }
        let read = pair.read(2, 0, 0, 4096);
        other.post(&[read]).unwrap();
        collect(&mut other, 1).unwrap().pop().unwrap().result.unwrap();
    }
}

#[test]
fn an_exporter_that_goes_away_ends_its_tcp_lanes() {
    let (mut pair, _) = pair(Transport::Tcp);
    let read = pair.read(1, 0, 0, 4096);
    drop(pair.exporter);
    let posted = pair.lane.post(&[read]).and_then(|_| collect(&mut pair.lane, 1).map(drop));
    assert!(matches!(posted, Err(LaneError::Closed | LaneError::Io(_))), "{posted:?}");
}

#[test]
fn a_shm_importer_cannot_write_what_it_was_given() {
    let (pair, _) = pair(Transport::Shm);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let shared: Vec<&str> = maps.lines().filter(|line| line.contains("/memfd:test")).collect();
    assert!(shared.iter().any(|line| line.contains("r--s")), "the peer's view is read-only: {shared:?}");
    drop(pair);
}

/// What a TCP lane says to a server that answers a read with `answer`.
fn lane_against(answer: Vec<u8>) -> Result<Vec<Completion>, LaneError> {
    let (pair, _) = pair(Transport::Tcp);
    let (ours, mut theirs) = stream_pair();
    let (request, blob) = pair.importer.request(LaneClass::Urgent).unwrap();
    // Over TCP a grant says what the request says.
    let mut lane = pair.importer.connect(request, &blob, vec![ours.into()]).unwrap();
    lane.post(&[pair.read(5, 0, 0, 64)]).unwrap();
    let mut asked = [0u8; 32];
    theirs.read_exact(&mut asked).unwrap();
    theirs.write_all(&answer).unwrap();
    drop(theirs);
    collect(&mut lane, 2)
}

#[test]
fn a_malicious_server_ends_the_lane_and_nothing_else() {
    let header = |tag: u64, status: u32, len: u32| {
        let mut bytes = tag.to_le_bytes().to_vec();
        bytes.extend(status.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend([0xee; 64]);
        bytes
    };
    for (answer, expected) in [
        (header(6, 0, 64), "out of order"),
        (header(5, 0, 65), "wrong length"),
        (header(5, 9, 64), "unknown status"),
        (header(5, 0, u32::MAX), "wrong length"),
        (header(5, 0, 64)[..40].to_vec(), "closed"),
        (vec![], "closed"),
    ] {
        let error = lane_against(answer).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} / {expected}");
    }
}

#[test]
fn what_nobody_sealed_ends_a_lane_under_tls_and_lands_nowhere() {
    let record = |length: u16, bytes: usize| {
        let mut record = vec![23, 3, 3];
        record.extend(length.to_be_bytes());
        record.resize(5 + bytes, 0xee);
        record
    };
    for (said, expected) in [
        (record(96, 96), "decrypt"),
        (record(96, 40), "closed"),
        (record(u16::MAX, 96), "MessageTooLarge"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), "InvalidContentType"),
        (vec![], "closed"),
    ] {
        let (pair, _) = pair(Transport::Tcp);
        let (_served, reads, mut below) = tls_pair_and_socket();
        let (request, blob) = pair.importer.request(LaneClass::Urgent).unwrap();
        let mut lane = pair.importer.connect(request, &blob, vec![reads]).unwrap();
        lane.post(&[pair.read(5, 0, 0, 64)]).unwrap();
        below.write_all(&said).unwrap();
        below.shutdown(std::net::Shutdown::Write).unwrap();
        let error = collect(&mut lane, 1).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} / {expected}");
        let mut landed = vec![0u8; MEMORY];
        assert!(pair.landing.read(0, &mut landed));
        assert!(landed.iter().all(|byte| *byte == 0), "{expected}: something has landed");
    }
}

/// Has the exporter serve one more lane, whoever is at its other end.
fn attach(pair: &mut Pair, stream: TcpStream) {
    let (_, blob) = pair.importer.request(LaneClass::Urgent).unwrap();
    pair.exporter.grant(&blob).unwrap();
    pair.exporter.attach(stream).unwrap();
}

#[test]
fn a_malicious_client_is_cut_off_and_the_exporter_serves_on() {
    let (mut pair, _) = pair(Transport::Tcp);
    let frame = |opcode: u32, len: u32, addr: u64| {
        let mut bytes = opcode.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
        bytes.extend(2u64.to_le_bytes());
        bytes.extend(addr.to_le_bytes());
        bytes
    };
    for bad in [frame(2, 64, 0), frame(1, 0, 0), frame(1, u32::MAX, 0)] {
        let (mut ours, theirs) = stream_pair();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        attach(&mut pair, theirs);
        ours.write_all(&bad).unwrap();
        let mut answer = Vec::new();
        assert_eq!(ours.read_to_end(&mut answer).unwrap_or(0), 0, "{bad:?} was answered");
    }
    // Out of bounds with an unknown key is a refusal, padded to the length that was asked for.
    let (mut ours, theirs) = stream_pair();
    attach(&mut pair, theirs);
    ours.write_all(&frame(1, 200_000, u64::MAX)).unwrap();
    let mut answer = vec![0u8; 16 + 200_000];
    ours.read_exact(&mut answer).unwrap();
    assert_eq!(answer[8], 1);
    assert!(answer[16..].iter().all(|byte| *byte == 0));

    let read = pair.read(9, 0, 0, 4096);
    pair.lane.post(&[read]).unwrap();
    collect(&mut pair.lane, 1).unwrap();
    assert_eq!(pair.source.len(), MEMORY);
}

#[test]
fn a_device_that_is_not_there_is_named_in_the_error() {
    let options = EndpointOptions { devices: vec!["mlx9_9".into()], ..Default::default() };
    let (memory, _) = filled(4096);
    let error = Exporter::new(Transport::Verbs, &[memory], &options).err().unwrap().to_string();
    assert!(error.starts_with("transport verbs is not available here"), "{error}");
    if Transport::Verbs.available().is_ok() {
        assert!(error.contains("mlx9_9"), "{error}");
    }
}

#[test]
fn options_that_make_no_sense_are_named_in_the_error() {
    let (memory, _) = filled(4096);
    let memories = std::slice::from_ref(&memory);
    let refusal = |transport, options: EndpointOptions| {
        Importer::new(transport, memories, &options).err().map(|error| error.to_string()).unwrap()
    };
    for paths in [0, 17] {
        let options = EndpointOptions { paths: Some(paths), ..Default::default() };
        assert_eq!(refusal(Transport::Tcp, options), format!("a lane has 1 to 16 paths, not {paths}"));
    }
    if Transport::Verbs.available().is_ok() {
        let verbs = |options| refusal(Transport::Verbs, options);
        let error = verbs(EndpointOptions { gid_index: Some(200), ..Default::default() });
        assert!(error.contains("no GID index 200; the port has 0"), "{error}");
        let error = verbs(EndpointOptions { port: Some(9), ..Default::default() });
        assert!(error.contains("port 9 does not exist"), "{error}");
        let error = verbs(EndpointOptions { mtu: Some(1500), ..Default::default() });
        assert!(error.contains("an MTU of 1500 bytes is none of"), "{error}");
        let error = verbs(EndpointOptions { ack_timeout: Some(32), ..Default::default() });
        assert!(error.contains("the ACK timeout is 1 to 31, not 32"), "{error}");
        let error = verbs(EndpointOptions { retries: Some(8), ..Default::default() });
        assert!(error.contains("the number of retries is 0 to 7, not 8"), "{error}");
    }
}

#[test]
fn what_a_grant_does_not_fit_is_refused() {
    for transport in available() {
        let (mut pair, _) = pair(transport);
        let (request, blob) = pair.importer.request(LaneClass::Urgent).unwrap();
        let grant = pair.exporter.grant(&blob).unwrap();
        let cut = pair.importer.connect(request, &grant[..grant.len() - 1], Vec::new());
        assert!(matches!(cut.err(), Some(SetupError::Malformed { .. })), "{transport}");
        // A grant of another class, and streams that do not come.
        let (request, _) = pair.importer.request(LaneClass::Bulk).unwrap();
        assert!(pair.importer.connect(request, &grant, Vec::new()).is_err(), "{transport}");
        if transport == Transport::Tcp {
            let (request, blob) = pair.importer.request(LaneClass::Urgent).unwrap();
            let grant = pair.exporter.grant(&blob).unwrap();
            assert!(pair.importer.connect(request, &grant, Vec::new()).is_err());
        }
    }
}
