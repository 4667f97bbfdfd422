from dataclasses import dataclass
import torch
@dataclass(frozen=True)
class PrefixLayout:
    starts: torch.Tensor
    parents: torch.Tensor
def prefix_attention(q,k,v,layout,*,scale=None,softcap=None,window=None):
    N=q.shape[0]; st=layout.starts.cpu(); par=layout.parents.cpu()
    L=st[1:]-st[:-1]
    seq=torch.repeat_interleave(torch.arange(len(L)),L)
    idx=torch.arange(N)
    plen=torch.where(par>=0,L[par.clamp_min(0)],0)
    pos=idx-st[seq]+plen[seq]
    same=(seq[:,None]==seq[None])&(idx[None]<=idx[:,None])
    par_of=(par[seq][:,None]==seq[None])
    m=same|par_of
    if window: m&=(pos[None]>pos[:,None]-window)
    g=q.shape[1]//k.shape[1]
    k=k.repeat_interleave(g,1); v=v.repeat_interleave(g,1)
    s=torch.einsum("ihd,jhd->hij",q,k)*(scale or q.shape[-1]**-.5)
    if softcap: s=softcap*torch.tanh(s/softcap)
    s=s.masked_fill(~m[None].to(s.device),float("-inf"))
    return torch.einsum("hij,jhd->ihd",s.softmax(-1),v)
