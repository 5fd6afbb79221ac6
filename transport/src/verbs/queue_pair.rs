//! A reliable-connected queue pair with its completion queue, from creation to ready.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use sideway::ibverbs::AccessFlags;
use sideway::ibverbs::address::{AddressHandleAttribute, Gid};
use sideway::ibverbs::completion::{BasicCompletionQueue, CompletionChannel, GenericCompletionQueue};
use sideway::ibverbs::device_context::Mtu;
use sideway::ibverbs::queue_pair::{BasicQueuePair, QueuePair, QueuePairAttribute, QueuePairState};

use super::device::VerbsDevice;
use super::wire::QueuePairAddress;
use crate::error::SetupError;

/// Packet sequence numbers are 24 bits wide.
const PSN_MASK: u32 = (1 << 24) - 1;
/// Retries after receiver-not-ready; no receives are ever posted, so it never counts.
const RNR_RETRIES: u8 = 7;
/// Receiver-not-ready timer code; no receives are ever posted, so it never runs.
const RNR_TIMER: u8 = 12;
/// Hops that a routed RoCE packet may take.
const HOP_LIMIT: u8 = 64;

/// A queue pair on the way to being connected, and what must outlive it. Fields drop in order.
pub(crate) struct Connection {
    pub(crate) pair: BasicQueuePair,
    pub(crate) completions: Arc<BasicCompletionQueue>,
    pub(crate) channel: Arc<CompletionChannel>,
    pub(crate) device: Arc<VerbsDevice>,
    psn: u32,
}

impl Connection {
    /// Makes a queue pair for `depth` reads in flight and brings it to INIT.
    ///
    /// `access` is what the peer may do through it.
    pub(crate) fn new(
        device: &Arc<VerbsDevice>,
        depth: u32,
        access: AccessFlags,
    ) -> Result<Self, SetupError> {
        let failed = |operation| {
            move |reason: String| SetupError::Verbs { operation, device: device.name.clone(), reason }
        };
        let context = &device.context;
        let channel =
            context.create_comp_channel().map_err(|e| failed("ibv_create_comp_channel")(e.to_string()))?;
        channel.set_nonblocking(true).map_err(|e| failed("O_NONBLOCK")(e.to_string()))?;
        let mut builder = context.create_cq_builder();
        builder.setup_cqe(depth + 1).setup_comp_channel(&channel, 0);
        // Basic objects, not extended: ibv_end_poll of rxe after an exhausted poll skips an entry
        // of the ring, so completions come twice (docs/adr/0002-verbs-binding.md).
        let completions = builder.build().map_err(|e| failed("ibv_create_cq")(e.to_string()))?;
        let mut builder = device.domain.create_qp_builder();
        let queue = || GenericCompletionQueue::from(completions.clone());
        builder.setup_send_cq(queue()).setup_recv_cq(queue());
        builder.setup_max_send_wr(depth).setup_max_recv_wr(1);
        let mut pair = builder.build().map_err(|e| failed("ibv_create_qp")(e.to_string()))?;
        let mut init = QueuePairAttribute::new();
        init.setup_state(QueuePairState::Init)
            .setup_pkey_index(0)
            .setup_port(device.port)
            .setup_access_flags(access);
        pair.modify(&init).map_err(|e| failed("ibv_modify_qp to INIT")(e.to_string()))?;
        let psn = getrandom::u32().map_err(|e| failed("getrandom")(e.to_string()))? & PSN_MASK;
        Ok(Self { pair, completions, channel, device: device.clone(), psn })
    }

    /// What the peer needs to connect to this queue pair.
    pub(crate) fn address(&self) -> QueuePairAddress {
        let device = &self.device;
        let gid = device.gid.map_or([0; 16], |(_, gid)| std::net::Ipv6Addr::from(gid).octets());
        QueuePairAddress::new(self.pair.qp_number(), self.psn, device.mtu, device.lid, device.read_atoms, gid)
    }

    /// Connects to the peer's queue pair: INIT → RTR → RTS. Returns the reads that may be
    /// outstanding, by both sides' limits.
    pub(crate) fn connect(&mut self, peer: &QueuePairAddress) -> Result<u8, SetupError> {
        let device = self.device.clone();
        let failed = |operation| {
            move |reason: String| SetupError::Verbs { operation, device: device.name.clone(), reason }
        };
        let atoms = self.device.read_atoms.min(peer.read_atoms);
        let mut receive = QueuePairAttribute::new();
        receive
            .setup_state(QueuePairState::ReadyToReceive)
            .setup_path_mtu(Mtu::from(u32::from(self.device.mtu.min(peer.mtu.get()))))
            .setup_dest_qp_num(peer.number.get())
            .setup_rq_psn(peer.psn.get())
            .setup_max_dest_read_atomic(atoms)
            .setup_min_rnr_timer(RNR_TIMER)
            .setup_address_vector(&self.path_to(peer));
        self.pair.modify(&receive).map_err(|e| failed.clone()("ibv_modify_qp to RTR")(e.to_string()))?;
        let mut send = QueuePairAttribute::new();
        send.setup_state(QueuePairState::ReadyToSend)
            .setup_sq_psn(self.psn)
            .setup_timeout(self.device.ack_timeout)
            .setup_retry_cnt(self.device.retries)
            .setup_rnr_retry(RNR_RETRIES)
            .setup_max_read_atomic(atoms);
        self.pair.modify(&send).map_err(|e| failed("ibv_modify_qp to RTS")(e.to_string()))?;
        Ok(atoms)
    }

    fn path_to(&self, peer: &QueuePairAddress) -> AddressHandleAttribute {
        let mut path = AddressHandleAttribute::new();
        path.setup_dest_lid(peer.lid.get()).setup_port(self.device.port);
        if let Some((index, _)) = self.device.gid {
            let gid = Gid::from(std::net::Ipv6Addr::from(peer.gid));
            path.setup_grh(&gid, 0, index, HOP_LIMIT, 0);
        }
        path
    }

    /// The completion channel's descriptor.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel owns the descriptor and lives as long as `self`, which the returned
        // borrow does not outlive.
        unsafe { BorrowedFd::borrow_raw(self.channel.as_raw_fd()) }
    }
}
